"""Ground truths that define the relevant examples of each query; retrieval metrics."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmin.attribution import FeatureSet
from dmin.evaluation.context import BenchmarkContext
from dmin.evaluation.metrics import measure
from dmin.evaluation.truths.base import Array, GroundTruth, Measures, column
from dmin.runtime.errors import DminError
from dmin.store import Store


@dataclass(eq=False)
class Relevance(GroundTruth):
    """A ground truth that defines the relevant examples of each query, for retrieval metrics.

    Args:
        metrics: see :func:`dmin.evaluation.metrics.measure`.
    """

    metrics: Sequence[str] = ("precision@10", "mAP")

    @abstractmethod
    def relevant(self, queries: Store, train: Store) -> Array:
        """Return bool ``[queries, examples]``, at least one True per query."""

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Find the relevant examples."""
        self._relevant = self.relevant(queries.store, context.train.store)

    def measure(self, scores: Array) -> Measures:
        """Return each metric of each query."""
        return {name: measure(name, scores, self._relevant) for name in self.metrics}


class SameColumn(Relevance):
    """An example is relevant if it has the query's value of a metadata column, such as a source.

    Args:
        column: its name.
        metrics: what to measure.
        each: also measure the queries of each value separately, as in the DMin paper's tables.
        value: the value of all queries, for queries without such a column, such as generated ones.
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
        """Return each metric of all queries, then of the queries of each value."""
        found = dict(super().measure(scores))
        for value in np.unique(self._asked) if self.each else ():
            own = self._asked == value
            found |= {f"{name}, {value}": found[name][own] for name in self.metrics}
        return found

    def relevant(self, queries: Store, train: Store) -> Array:
        """Return bool ``[queries, examples]``.

        Raises:
            DminError: a query or example lacks the column, or no example has a query's value.
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
                f"Training examples have {', '.join(np.unique(known)[:20])}. Use only queries with "
                f"these."
            )
        return np.asarray(self._asked[:, None] == known[None, :])


class SameLabel(SameColumn):
    """An example is relevant if it has the query's label: DMin's detection rate.

    It rewards similarity of images (a pixel distance scores well), so compare it with the pixel
    baseline.

    Args:
        metrics: what to measure.
    """

    def __init__(
        self, metrics: Sequence[str] = ("precision@5", "precision@10", "precision@50", "mAP")
    ) -> None:
        super().__init__("label", metrics)


@dataclass(eq=False)
class Source(Relevance):
    """The only relevant example is the one from which the query was made.

    Args:
        metrics: what to measure.
    """

    metrics: Sequence[str] = ("recall@1", "recall@5", "MRR")

    def relevant(self, queries: Store, train: Store) -> Array:
        """Return bool ``[queries, examples]`` with one True per row.

        Raises:
            DminError: a query does not name its source, or the source is not in the store.
        """
        found = np.zeros((len(queries), len(train)), dtype=bool)
        for query, source in enumerate(column(queries, "source_id")):
            found[query, train.index(str(source))] = True
        return found
