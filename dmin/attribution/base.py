"""What an attribution method is: two sides of examples in, a score for each pair out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dmin.data.base import Dataset
from dmin.errors import DminError
from dmin.store import Layout, Store


@dataclass(frozen=True)
class Requires:
    """What a method needs to be there.

    Args:
        readouts: gradients it reads from the store.
        images: it compares the images themselves, so both datasets must be at hand.
    """

    readouts: tuple[str, ...] = ("loss",)
    images: bool = False


@dataclass(frozen=True)
class ExampleBlock:
    """Consecutive examples of one side, with what the method requires of them."""

    first: int  # row of the first example in its store
    ids: Sequence[str]
    features: dict[str, Tensor] = field(default_factory=dict)  # readout -> [n, D, T, G, k]
    norms: dict[str, Tensor] = field(default_factory=dict)  # readout -> [n, D, T, G]
    images: Tensor | None = None  # [n, C, H, W] in [0, 1]


class Side:
    """One side of the comparison, queries or training examples: a store, and perhaps its images.

    Args:
        store: the features.
        dataset: the examples, needed by methods that look at images; found by their ids.
    """

    def __init__(self, store: Store, dataset: Dataset | None = None) -> None:
        self.store = store
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.store)

    def block(self, rows: Sequence[int] | np.ndarray, requires: Requires) -> ExampleBlock:
        """Return chosen rows, in the order given, with what a method requires."""
        store, readouts = self.store, requires.readouts
        ids = [store.ids[row] for row in rows]
        return ExampleBlock(
            first=int(rows[0]),
            ids=ids,
            features={name: torch.from_numpy(store.rows(name, rows)) for name in readouts},
            norms={name: torch.from_numpy(self._norms(name)[rows]) for name in readouts},
            images=torch.stack([self.image(i) for i in ids]) if requires.images else None,
        )

    def blocks(self, requires: Requires, rows: int = 1024) -> Iterator[ExampleBlock]:
        """Yield the side block by block, reading only what a method requires."""
        for start in range(0, len(self), rows):
            yield self.block(np.arange(start, min(start + rows, len(self))), requires)

    def image(self, id: str) -> Tensor:
        """Return the image of an example, ``[C, H, W]`` in [0, 1].

        Raises:
            DminError: there is no dataset, or it has no such example.
        """
        if self.dataset is None:
            raise DminError(
                "this method compares images, but only a store was given. Give the dataset as "
                "well: Side(store, dataset)."
            )
        if id not in self._positions:
            raise DminError(
                f"the store has an example {id!r} that the dataset lacks: the dataset changed "
                f"since collection. Restore it, or collect again."
            )
        return self.dataset[self._positions[id]].image

    @cached_property
    def _positions(self) -> dict[str, int]:
        assert self.dataset is not None
        return {self.dataset[i].id: i for i in range(len(self.dataset))}

    def _norms(self, readout: str) -> np.ndarray:
        if readout not in self._loaded_norms:
            self._loaded_norms[readout] = self.store.norms(readout)
        return self._loaded_norms[readout]

    @cached_property
    def _loaded_norms(self) -> dict[str, np.ndarray]:
        return {}


@dataclass(frozen=True)
class Linear:
    """Scores that are one inner product with scaled rows of the store, each query's own vector.

    ``I(q, i) = Σ_{d,t} c_{d,t}(i) ⟨q_{d,t}, x_{d,t}(i)⟩``, x the rows as they are stored.

    Args:
        queries: q, float32 ``[Q, D, T, G, k]``; weights and what else belongs to queries included.
        scale: c. ``unit`` brings every row to length 1, ``norm`` to its gradient's, ``none`` is 1.
        readout: which rows.
    """

    queries: Tensor
    scale: Literal["unit", "norm", "none"] = "none"
    readout: str = "loss"


class Method(ABC):
    """Scores every pair of a query and a training example; a larger score is more influence.

    Scores must not depend on how the training side is cut into blocks.
    """

    name: str
    requires = Requires()

    def fit(self, train: Side) -> None:  # noqa: B027 (most methods learn nothing)
        """Look at the whole training side once, before any score."""

    def transform_query(self, queries: ExampleBlock) -> Any:
        """Prepare the queries once; what it returns is handed to :meth:`score`."""
        return queries

    @abstractmethod
    def score(self, queries: Any, train: ExampleBlock) -> Tensor:
        """Return the scores ``[queries, n]`` of a block of n training examples."""

    def contributions(self, queries: Any, train: ExampleBlock) -> Tensor | None:
        """Return what each timestep adds, ``[queries, n, T]``, or None if they do not add up."""
        return None

    def linear(self, queries: Any, layout: Layout) -> Linear | None:
        """Return the scores as one inner product, or None if they are not: see :class:`Linear`.

        A method that has this is scanned at the speed of memory and can be searched by an index;
        it must agree with :meth:`score`.

        Args:
            queries: what :meth:`transform_query` returned.
            layout: of the stores.
        """
        return None


def in_row_order(queries: Tensor, layout: Layout) -> Tensor:
    """Return query vectors ``[Q, T, D·G·k]``, scaled by 1/√D, as ``[Q, D, T, G, k]``, by 1/D.

    Averages over the draws are 1/√D on both sides for a method; rows of the store have no share.
    """
    draws, times, groups, dim = layout.row_shape
    rows = queries.view(len(queries), times, draws, groups, dim) / draws**0.5
    return rows.transpose(1, 2)


def check_pair(queries: Side, train: Side, method: Method) -> None:
    """Refuse a pair of sides that a method cannot compare.

    Raises:
        DminError: stores of other weights, schedule or sketch; an incomplete store; a readout that
            was not collected.
    """
    from dmin.store import check_comparable

    queries.store.require_complete()
    train.store.require_complete()
    check_comparable(queries.store, train.store)
    missing = set(method.requires.readouts) - set(train.store.layout.readouts)
    if missing:
        raise DminError(
            f"method={method.name} needs the readouts {', '.join(sorted(missing))}; the store has "
            f"{', '.join(train.store.layout.readouts)}. Collect again with "
            f"collect.readouts=[{','.join(sorted({*train.store.layout.readouts, *missing}))}]."
        )
