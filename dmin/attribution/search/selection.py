"""Which examples a search returns: filtered by metadata, in which order, alone or by group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmin.runtime.array_files import packed, unpacked
from dmin.runtime.errors import DminError


@dataclass(frozen=True)
class Selection:
    """Which training examples to return, and in which order.

    Args:
        order: ``proponents``, the largest scores first, or ``opponents``, the smallest first.
        min_score: leave out examples with a smaller score (for opponents: larger than its
            negative).
        where: only examples whose metadata have these values; a list allows each of its values.
        group_by: a metadata column: rank its values instead of single examples.
        group_score: ``sum``, ``mean`` or ``max`` of the scores of a group's examples (for opponents
            ``max`` is the smallest).
        split: require that scores can be split between groups of layers; else they are split if
            possible.

    Raises:
        DminError: a value is not allowed.
    """

    order: str = "proponents"
    min_score: float | None = None
    where: Mapping[str, Any] | None = None
    group_by: str | None = None
    group_score: str = "sum"
    split: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        for name, allowed in (
            ("order", ("proponents", "opponents")),
            ("group_score", ("sum", "mean", "max")),
        ):
            if getattr(self, name) not in allowed:
                raise DminError(f"{name} is {getattr(self, name)!r}: use {' or '.join(allowed)}.")
        low, by, where = self.min_score, self.group_by, self.where
        if low is not None and not (isinstance(low, Real) and math.isfinite(low)):
            raise DminError(f"min_score={low!r}: give a finite number, or None.")
        if by is not None and not (isinstance(by, str) and by):
            raise DminError(f"group_by={by!r}: give the name of one metadata column, or None.")
        if where is not None and not isinstance(where, Mapping):
            raise DminError(f"where={where!r}: give columns and values, such as {{'label': 3}}.")

    @property
    def sign(self) -> int:
        """1, or −1 for opponents: the factor that makes the largest score come first."""
        return 1 if self.order == "proponents" else -1

    def candidates(self, metadata: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
        """Return the number of candidates, and a name for them."""
        kept = self.kept(metadata)
        if self.group_by:
            number = self.groups(metadata)[1]
            number = number if kept is None else number[kept]
            return len(np.unique(number[number >= 0])), f"values of {self.group_by}"
        if kept is None:
            return len(metadata), "training examples"
        return int(kept.sum()), "training examples that `where` allows"

    def kept(self, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
        """Return which examples ``where`` allows, bool ``[N]``; None for all.

        Raises:
            DminError: there is no such column, or no example is left.
        """
        if not self.where:
            return None
        kept = np.ones(len(metadata), dtype=bool)
        for column, wanted in self.where.items():
            values = _column(metadata, column)
            allowed = wanted if isinstance(wanted, list | tuple) else [wanted]
            texts = {_text(value) for value in allowed}
            kept &= np.array([value in texts for value in values])
            if not kept.any():
                seen = ", ".join(sorted({v for v in values if v is not None})[:10])
                raise DminError(
                    f"where: no training example has {column} = {', '.join(sorted(texts))}"
                    f"{' and the rest' if len(self.where) > 1 else ''}; its values are {seen}."
                )
        return kept

    def groups(self, metadata: Sequence[Mapping[str, Any]]) -> tuple[list[str], np.ndarray]:
        """Return the names of the groups, sorted, and the group of each example or −1, ``[N]``."""
        assert self.group_by is not None
        values = _column(metadata, self.group_by)
        names = sorted({value for value in values if value is not None})
        number = {name: place for place, name in enumerate(names)}
        return names, np.array([-1 if v is None else number[v] for v in values])


class Groups:
    """Scores of groups, from a stream of the scores of their examples.

    Args:
        queries: number of queries.
        names: of the groups.
        of: the group of each training example, or −1, ``[N]``.

    Attributes:
        best: float32 ``[queries, groups]``, the largest score of a group's examples.
        rows: int64 ``[queries, groups]``, its example; of equal ones the first.
        sums: float64 ``[queries, groups]``.
        counts: int64 ``[groups]``, examples per group.
    """

    STATE = ("best", "rows", "sums", "counts")

    def __init__(self, queries: int, names: list[str], of: np.ndarray) -> None:
        self.names = names
        self.of: Tensor = torch.from_numpy(of)
        self.best: Tensor = torch.full((queries, len(names)), -torch.inf)
        self.rows: Tensor = torch.full((queries, len(names)), len(of))
        self.sums = torch.zeros(queries, len(names), dtype=torch.float64)
        self.counts = torch.zeros(len(names), dtype=torch.int64)

    def update(self, scores: Tensor, first: int) -> None:
        """Take the scores ``[queries, n]`` of the rows from ``first``; −∞ is left out."""
        group = self.of[first : first + scores.shape[1]]
        inside = (group >= 0) & (scores[0] > -torch.inf)
        group, scores = group[inside], scores[:, inside]
        rows = (torch.arange(len(inside)) + first)[inside].expand_as(scores)
        place = group.expand_as(scores)
        before = self.best.clone()
        self.best.scatter_reduce_(1, place, scores, "amax")
        leads = (scores == self.best.gather(1, place)) & (scores > before.gather(1, place))
        self.rows[self.best > before] = len(self.of)
        last = torch.full_like(rows, len(self.of))
        self.rows.scatter_reduce_(1, place, rows.where(leads, last), "amin")
        self.sums.index_add_(1, group, scores.double())
        self.counts.index_add_(0, group, torch.ones_like(group))

    def join(self, other: Groups) -> None:
        """Merge the tallies of the same groups and queries in other rows."""
        ahead = (other.best > self.best) | ((other.best == self.best) & (other.rows < self.rows))
        self.best = other.best.where(ahead, self.best)
        self.rows = other.rows.where(ahead, self.rows)
        self.sums += other.sums
        self.counts += other.counts

    def extend(self, other: Groups) -> None:
        """Append the tallies of the same groups and rows for further queries."""
        for name in ("best", "rows", "sums"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))

    def of_queries(self, numbers: np.ndarray) -> Groups:
        """Return the tallies of some of the queries."""
        found = Groups(0, self.names, self.of.numpy())
        for name in ("best", "rows", "sums"):
            setattr(found, name, getattr(self, name)[numbers])
        found.counts = self.counts
        return found

    def dump(self) -> memoryview:
        """Serialise the tallies, for :meth:`load`."""
        state = {name: getattr(self, name).numpy() for name in self.STATE}
        return packed({"names": self.names}, {"of": self.of.numpy(), **state})

    @classmethod
    def load(cls, file: Path) -> Groups:
        """Read the tallies written by :meth:`dump`.

        Raises:
            DminError: the file is damaged.
        """
        try:
            kept = unpacked(np.fromfile(file, np.uint8))
            found = cls(0, kept.about["names"], kept.arrays["of"])
            for name in cls.STATE:
                setattr(found, name, torch.from_numpy(kept.arrays[name]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DminError(f"{file} is damaged ({error}): rank that part again.") from error
        return found

    def scores(self, kind: str) -> Tensor:
        """Return the scores of all groups, float32 ``[queries, groups]``; empty ones have −∞."""
        sums = self.sums if kind == "sum" else self.sums / self.counts
        found = self.best.double() if kind == "max" else sums
        return found.where(self.counts > 0, -torch.inf).float()


def _column(metadata: Sequence[Mapping[str, Any]], column: str) -> list[str | None]:
    """Return a column as texts; None where an example has no value."""
    if not any(column in each for each in metadata):
        known = ", ".join(sorted({key for each in metadata for key in each})) or "none"
        raise DminError(f"The training examples have no metadata {column!r}: they have {known}.")
    return [None if each.get(column) is None else _text(each[column]) for each in metadata]


def _text(value: Any) -> str:
    """Compare values as text, as a command line may give numbers as text."""
    return str(value)
