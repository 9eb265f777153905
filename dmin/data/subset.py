"""A part of a dataset: for models trained on subsets, and for quick trials."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dmin.data.base import Dataset, Example, Facts, describe_dataset, describe_fully
from dmin.data.ids import facts_at, file_at, ids_of, positions_of
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import fingerprint


class Subset:
    """Some of a dataset's examples, with their ids, in the dataset's order.

    Give exactly one of ``ids``, ``count`` and ``fraction``.

    Args:
        dataset: the whole dataset.
        ids: ids of the examples.
        count: number of examples, drawn without replacement.
        fraction: fraction of all examples, in (0, 1], drawn in the same way.
        seed: key of the draw. With equal seeds, a smaller draw is part of a larger one.

    Raises:
        DminError: none or several of the three are given, or the dataset lacks such examples.
    """

    def __init__(
        self,
        dataset: Dataset,
        ids: Sequence[str] | None = None,
        count: int | None = None,
        fraction: float | None = None,
        seed: int = 0,
    ) -> None:
        given = {"ids": ids, "count": count, "fraction": fraction}
        if sum(value is not None for value in given.values()) != 1:
            listed = ", ".join(f"{k}={'null' if v is None else '...'}" for k, v in given.items())
            raise DminError(f"Subset({listed}): give exactly one of ids, count and fraction.")
        self.dataset = dataset
        self.positions: list[int] = (
            _positions(dataset, ids)
            if ids is not None
            else _drawn(len(dataset), count, fraction, seed)
        )

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.positions)

    def __getitem__(self, index: int) -> Example:
        """Return one example."""
        return self.dataset[self.positions[index]]

    @property
    def ids(self) -> list[str]:
        """The ids of the examples, in order."""
        ids = ids_of(self.dataset)
        return [ids[position] for position in self.positions]

    def describe(self) -> dict[str, Any]:
        """Return the description of the whole dataset, and a fingerprint of the positions."""
        return self._described(describe_dataset(self.dataset))

    def describe_fully(self, kept: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Return the same with the whole dataset described with its metadata."""
        return self._described(describe_fully(self.dataset, kept))

    def facts(self, index: int) -> Facts:
        """Return what is known about an example besides its pixels."""
        return facts_at(self.dataset, self.positions[index])

    def shape(self, index: int) -> Any:
        """Return the width and height of an example's tensor, if the whole dataset knows them."""
        known = getattr(self.dataset, "shape", None)
        return known(self.positions[index]) if callable(known) else None

    def file(self, index: int) -> Path | None:
        """Return the file of an example's image, if the whole dataset has such files."""
        return file_at(self.dataset, self.positions[index])

    def _described(self, whole: dict[str, Any]) -> dict[str, Any]:
        return {
            **({"schema": whole["schema"]} if "schema" in whole else {}),
            "name": type(self).__name__,
            "examples": len(self),
            "dataset": whole,
            "positions": fingerprint({"positions": self.positions}),
        }


def _positions(dataset: Dataset, ids: Sequence[str]) -> list[int]:
    position = positions_of(dataset)
    unknown = [wanted for wanted in ids if wanted not in position]
    if unknown:
        raise DminError(
            f"Subset: {len(unknown)} of {len(ids)} ids are not in the dataset, such as "
            f"{unknown[0]!r}. Its ids look like {next(iter(position))!r}."
        )
    if not ids or len(set(ids)) < len(ids):
        raise DminError("Subset: ids must list one or more examples, each once.")
    return sorted(position[wanted] for wanted in ids)


def _drawn(examples: int, count: int | None, fraction: float | None, seed: int) -> list[int]:
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise DminError(f"Subset: fraction={fraction:g}; a number above 0, up to 1 is needed.")
        count = max(1, round(fraction * examples))
    if count is None or not 1 <= count <= examples:
        raise DminError(
            f"Subset: count={count}, but the dataset has {examples} examples (1 or up)."
        )
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:count].tolist())
