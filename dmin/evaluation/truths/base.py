"""Base class of ground truths: one number for each query and metric."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np

from dmin.attribution import FeatureSet
from dmin.evaluation.context import BenchmarkContext
from dmin.evaluation.metrics import resampled_means
from dmin.runtime.errors import DminError
from dmin.store import Store

Array = np.ndarray
Measures = Mapping[str, Array]
"""Metric -> one number per query, ``[Q]`` (or per other unit that the mean is taken over)."""


class GroundTruth(ABC):
    """Measures scores. A new ground truth is a subclass with :meth:`measure`, and one YAML.

    Attributes:
        of: ``pairs``: needs scores of queries and training examples, ``[Q, N]``; ``self``: needs
            the self-influence of the training examples ``rows``, ``[len(rows)]``.
        ranks_only: whether only the order of each query's examples matters, so that monotone
            transforms of the scores change nothing.
        costly: whether each new row takes minutes; then only rows named in
            ``benchmark.costly_for`` are measured.
        clusters: number of units drawn with replacement by the bootstrap; None: queries.
    """

    of: ClassVar[Literal["pairs", "self"]] = "pairs"
    rows: Sequence[int] | Array = ()
    ranks_only: ClassVar[bool] = True
    costly: ClassVar[bool] = False
    clusters: int | None = None

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:  # noqa: B027 (many need nothing)
        """Read the data, and train models that do not depend on scores; called once.

        Args:
            context: model, training examples, retraining.
            queries: of the task.
        """

    def expect(self, scores: Mapping[str, Array]) -> None:  # noqa: B027 (only retraining needs it)
        """Receive all scores that will be measured, by row, so that models train together."""

    @abstractmethod
    def measure(self, scores: Array) -> Measures:
        """Return one number for each query for each metric; larger is better."""

    def resampled(self, scores: Array, measured: Measures, count: int) -> Measures:
        """Return the mean of each metric in each of ``count`` resamples, ``[R]``.

        The draws must not depend on the scores, so that the difference of two methods is paired.
        """
        return {name: resampled_means(values, count) for name, values in measured.items()}

    def references(self) -> Mapping[str, Measures]:
        """Return reference rows that are not methods, such as the ceiling, by name."""
        return {}


def column(store: Store, name: str) -> Array:
    """Return a metadata column as text, ``[N]``.

    Raises:
        DminError: an example does not have it.
    """
    missing = [id for id, row in zip(store.ids, store.metadata, strict=True) if name not in row]
    if missing:
        there = sorted(set.intersection(*({*row} for row in store.metadata)))
        raise DminError(
            f"{len(missing)} of {len(store)} examples in {store.path} have no {name!r}, which this "
            f"ground truth compares, such as {missing[0]!r}. All examples have: "
            f"{', '.join(there) or '-'}. Choose one of these as the ground truth's column, or add "
            f"{name!r} to the metadata."
        )
    return np.array([str(row[name]) for row in store.metadata])
