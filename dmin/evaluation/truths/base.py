"""What scores are held against: one class a ground truth, one number a query and metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np

from dmin.attribution import FeatureSet
from dmin.evaluation.context import BenchmarkContext
from dmin.evaluation.metrics import measure
from dmin.runtime.errors import DminError
from dmin.store import Store

Array = np.ndarray
Measures = Mapping[str, Array]
"""For each metric one number a query, ``[Q]`` (or for whatever its mean is taken over)."""


class GroundTruth(ABC):
    """Says how good scores are. A new one is a subclass with :meth:`measure`, and one YAML.

    Attributes:
        of: ``pairs`` to be given scores of queries and training examples, ``[Q, N]``; ``self`` for
            the scores of the training examples ``rows`` with themselves, ``[len(rows)]``.
        ranks_only: whether nothing but each query's order of examples matters, so that monotone
            transforms of the scores change nothing.
        costly: whether each new row takes minutes: then only the rows are measured that
            ``benchmark.costly_for`` names.
    """

    of: ClassVar[Literal["pairs", "self"]] = "pairs"
    rows: Sequence[int] | Array = ()
    ranks_only: ClassVar[bool] = True
    costly: ClassVar[bool] = False

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:  # noqa: B027 (many need nothing)
        """Look at the data, and train what does not depend on any score; called once.

        Args:
            context: model, training examples, retraining.
            queries: those of the task.
        """

    def expect(self, scores: Mapping[str, Array]) -> None:  # noqa: B027 (only retraining needs it)
        """Be told all scores that will be measured, so that models can be trained together."""

    @abstractmethod
    def measure(self, scores: Array) -> Measures:
        """Return one number a query for each metric; larger is better."""

    def resampled(self, scores: Array, measured: Measures, count: int) -> Measures:
        """Return the mean of each metric in each of ``count`` resamples, ``[R]``.

        The draws must not depend on the scores, so that the difference of two methods is paired.
        """
        return {name: resampled_means(values, count) for name, values in measured.items()}

    def references(self) -> Mapping[str, Measures]:
        """Return rows that are no method, such as the ceiling, by name."""
        return {}


def resampled_means(values: Array, count: int, seed: int = 0) -> Array:
    """Return the means of ``count`` draws of that many values with replacement, ``[R]``."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(count, len(values)))
    return np.asarray(values[drawn].mean(axis=1))


class Relevance(GroundTruth):
    """A ground truth that names the right examples of each query; metrics of retrieval.

    Args:
        metrics: see :func:`dmin.evaluation.metrics.measure`.
    """

    def __init__(self, metrics: Sequence[str] = ("precision@10", "mAP")) -> None:
        self.metrics = tuple(metrics)

    @abstractmethod
    def relevant(self, queries: Store, train: Store) -> Array:
        """Return bool ``[queries, examples]``, at least one True a query."""

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Find the right answers."""
        self._relevant = self.relevant(queries.store, context.train.store)

    def measure(self, scores: Array) -> Measures:
        """Return each metric of each query."""
        return {name: measure(name, scores, self._relevant) for name in self.metrics}


class SameColumn(Relevance):
    """An example is right if it shares the query's value of a metadata column, such as a source.

    Args:
        column: its name.
        metrics: what to measure.
        each: measure the queries of each value apart as well, as the tables of the DMin paper do.
        value: of all queries, which then need no such column, as generated ones have none.
    """

    def __init__(
        self,
        column: str,
        metrics: Sequence[str] = ("precision@10", "mAP"),
        each: bool = False,
        value: str | None = None,
    ) -> None:
        super().__init__(metrics)
        self.column, self.each, self.value = column, each, value

    def measure(self, scores: Array) -> Measures:
        """Return each metric of all queries, then of those of each value."""
        found = dict(super().measure(scores))
        for value in np.unique(self._asked) if self.each else ():
            own = self._asked == value
            found |= {f"{name}, {value}": found[name][own] for name in self.metrics}
        return found

    def relevant(self, queries: Store, train: Store) -> Array:
        """Return bool ``[queries, examples]``.

        Raises:
            DminError: a query or example has no such column, or a query a value of its own.
        """
        if self.value is None:
            self._asked = column(queries, self.column)
        else:
            self._asked = np.full(len(queries), self.value)
        known = column(train, self.column)
        if len(lost := np.flatnonzero(~np.isin(self._asked, known))):
            raise DminError(
                f"{len(lost)} of {len(queries)} queries have a {self.column} that no training "
                f"example has, such as {queries.ids[lost[0]]!r} with {self._asked[lost[0]]!r}. "
                f"There is {', '.join(np.unique(known)[:20])}. Ask about these alone."
            )
        return np.asarray(self._asked[:, None] == known[None, :])


class SameLabel(SameColumn):
    """An example is right if it has the query's label: DMin's detection rate.

    It rewards mere likeness (a pixel distance does well by it), so read it beside the pixel
    baseline and never alone.

    Args:
        metrics: what to measure.
    """

    def __init__(
        self, metrics: Sequence[str] = ("precision@5", "precision@10", "precision@50", "mAP")
    ) -> None:
        super().__init__("label", metrics)


class Source(Relevance):
    """The one right example is the one the query was made from.

    Args:
        metrics: what to measure.
    """

    def __init__(self, metrics: Sequence[str] = ("recall@1", "recall@5", "MRR")) -> None:
        super().__init__(metrics)

    def relevant(self, queries: Store, train: Store) -> Array:
        """Return bool ``[queries, examples]`` with one True a row.

        Raises:
            DminError: a query does not name its source, or the source is not in the store.
        """
        found = np.zeros((len(queries), len(train)), dtype=bool)
        for query, source in enumerate(column(queries, "source_id")):
            found[query, train.index(str(source))] = True
        return found


class SelfInfluence(GroundTruth):
    """Do examples that a column marks, such as mislabelled ones, score highest with themselves?

    ``AUROC = P(τ(i, i) > τ(j, j))`` for a marked i and an unmarked j, ties counted half: the mean
    over marked examples of the share of unmarked ones below (Pruthi et al. 2020, section 4.1).
    The loss of each example is a reference that needs no gradient.

    Args:
        column: of the metadata; an example that has it (and not false or null) is marked.
        sample: unmarked examples that the marked ones are compared with, evenly spread.
    """

    of = "self"

    def __init__(self, column: str = "mislabelled", sample: int = 250) -> None:
        self.column, self.sample = column, sample

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Find the marked examples.

        Raises:
            DminError: none or all are.
        """
        train = context.train.store
        is_marked = np.array([bool(row.get(self.column)) for row in train.metadata])
        marked, others = np.flatnonzero(is_marked), np.flatnonzero(~is_marked)
        if not len(marked) or not len(others):
            raise DminError(
                f"{len(marked)} of {len(is_marked)} training examples have {self.column!r} in "
                f"their metadata; self-influence compares those that have it with the others."
            )
        step = max(1, len(others) // self.sample)
        self.rows = np.concatenate([marked, others[::step][: self.sample]])
        self._marked = is_marked[self.rows]
        self._losses = train.losses().mean((1, 2))[self.rows]

    def measure(self, scores: Array) -> Measures:
        """Return the share of unmarked examples that score below each marked one."""
        marked, others = scores[self._marked, None], scores[None, ~self._marked]
        return {"AUROC": ((marked > others) + 0.5 * (marked == others)).mean(1)}

    def references(self) -> Mapping[str, Measures]:
        """Return what the loss alone finds."""
        return {"training loss": self.measure(self._losses)}


def column(store: Store, name: str) -> Array:
    """Return a metadata column as text, ``[N]``.

    Raises:
        DminError: an example does not have it.
    """
    missing = [id for id, row in zip(store.ids, store.metadata, strict=True) if name not in row]
    if missing:
        there = sorted(set.intersection(*({*row} for row in store.metadata)))
        raise DminError(
            f"{len(missing)} of {len(store)} examples in {store.path} have no {name!r}, such as "
            f"{missing[0]!r}; this ground truth compares it. All have: {', '.join(there) or '-'}. "
            f"Name one of these as the ground truth's column, or add {name!r} to the metadata."
        )
    return np.array([str(row[name]) for row in store.metadata])
