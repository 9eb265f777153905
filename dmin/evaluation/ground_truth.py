"""Which training examples count as right answers to a query."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from dmin.errors import DminError
from dmin.store import Store


class GroundTruth(ABC):
    """Says for each query which training examples are right, and what to measure by it."""

    metrics: tuple[str, ...]

    @abstractmethod
    def relevant(self, queries: Store, train: Store) -> np.ndarray:
        """Return bool ``[queries, examples]``."""


class SameLabel(GroundTruth):
    """An example is right if it has the query's label: DMin's detection rate.

    It rewards mere likeness (a pixel distance does well by it), so read it beside the pixel
    baseline and never alone.
    """

    metrics = ("precision@5", "precision@10", "precision@50", "mAP")

    def relevant(self, queries: Store, train: Store) -> np.ndarray:
        """Return bool ``[queries, examples]``.

        Raises:
            DminError: a query or example has no label.
        """
        return _column(queries, "label")[:, None] == _column(train, "label")[None, :]


class SameColumn(GroundTruth):
    """An example is right if it shares the query's value of a metadata column, such as a source.

    Args:
        column: its name.
        metrics: what to measure.
    """

    def __init__(self, column: str, metrics: Sequence[str] = ("precision@10", "mAP")) -> None:
        self.column = column
        self.metrics = tuple(metrics)

    def relevant(self, queries: Store, train: Store) -> np.ndarray:
        """Return bool ``[queries, examples]``.

        Raises:
            DminError: a query or example has no such column.
        """
        return _column(queries, self.column)[:, None] == _column(train, self.column)[None, :]


class Source(GroundTruth):
    """The one right example is the one the query was made from."""

    metrics = ("recall@1", "recall@5", "MRR")

    def relevant(self, queries: Store, train: Store) -> np.ndarray:
        """Return bool ``[queries, examples]`` with one True a row.

        Raises:
            DminError: a query does not name its source, or the source is not in the store.
        """
        found = np.zeros((len(queries), len(train)), dtype=bool)
        for query, source in enumerate(_column(queries, "source_id")):
            found[query, train.index(str(source))] = True
        return found


def _column(store: Store, name: str) -> np.ndarray:
    missing = [id for id, row in zip(store.ids, store.metadata, strict=True) if name not in row]
    if missing:
        raise DminError(
            f"{len(missing)} example(s) in {store.path} have no {name!r}, such as {missing[0]!r}; "
            f"this ground truth compares it. Use data that has it, or another ground truth."
        )
    return np.array([str(row[name]) for row in store.metadata])
