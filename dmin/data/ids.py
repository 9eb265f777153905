"""The one lookup of examples by their ids."""

from __future__ import annotations

from collections.abc import Sequence

from dmin.data.base import Dataset


def ids_of(dataset: Dataset) -> Sequence[str]:
    """Return all ids, from a list if the dataset keeps one, else by reading every example."""
    ids: Sequence[str] | None = getattr(dataset, "ids", None)
    return ids if ids is not None else [dataset[index].id for index in range(len(dataset))]


def positions_of(dataset: Dataset) -> dict[str, int]:
    """Return where each id stands in a dataset."""
    return {id: position for position, id in enumerate(ids_of(dataset))}
