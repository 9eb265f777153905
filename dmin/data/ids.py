"""Look up examples and their metadata by id."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dmin.data.base import Dataset, Facts


def ids_of(dataset: Dataset) -> Sequence[str]:
    """Return all ids, from the attribute ``ids`` if it exists, else by reading all examples."""
    ids: Sequence[str] | None = getattr(dataset, "ids", None)
    return ids if ids is not None else [dataset[index].id for index in range(len(dataset))]


def positions_of(dataset: Dataset) -> dict[str, int]:
    """Return the position of each id in a dataset."""
    return {id: position for position, id in enumerate(ids_of(dataset))}


def facts_of(dataset: Dataset) -> Iterator[Facts]:
    """Yield what is known about each example; no image is read if the dataset has ``facts``."""
    return (facts_at(dataset, index) for index in range(len(dataset)))


def facts_at(dataset: Dataset, index: int) -> Facts:
    """Return what is known about one example besides its pixels."""
    known = getattr(dataset, "facts", None)
    return known(index) if callable(known) else dataset[index].facts


def one_of_each_shape(dataset: Dataset) -> list[int]:
    """Return the position of the first example of each shape, if there are several known ones."""
    known = getattr(dataset, "shape", None)
    shapes = [known(index) for index in range(len(dataset))] if callable(known) else []
    first = {shape: index for index, shape in reversed(list(enumerate(shapes))) if shape}
    return sorted(first.values()) if len(first) > 1 else []


def file_at(dataset: Dataset, index: int) -> Path | None:
    """Return the file of an example's image, if it has one."""
    find = getattr(dataset, "file", None)
    return find(index) if callable(find) else None
