"""Scores from some timesteps only: large t reflect composition, small t texture."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.method import Method
from dmin.runtime.errors import DminError
from dmin.store import Layout, Store


def places_of(timesteps: Sequence[float], known: Sequence[float]) -> list[int]:
    """Return the indices of timesteps among those of a store, in its order.

    Raises:
        DminError: one is missing or given twice, or the list is empty.
    """
    found = [np.flatnonzero(np.isclose(known, t, rtol=1e-4, atol=0)).tolist() for t in timesteps]
    odd = [t for t, places in zip(timesteps, found, strict=True) if len(places) != 1]
    chosen = sorted({place for places in found for place in places})
    if odd or not chosen or len(chosen) < len(found):
        wrong = f"t = {odd[0]:g} is not among the" if odd else "give each once, of the"
        raise DminError(
            f"retrieve.timesteps={list(timesteps)}: {wrong} timesteps of the store, which are "
            f"{', '.join(f'{t:g}' for t in known)}."
        )
    return chosen


class AtTimesteps(Method):
    """Another method's scores from some timesteps alone, as of a store that has no others.

    Scores that are inner products stay ones with the store's rows, the query's nought elsewhere.

    Args:
        method: whose scores.
        timesteps: some of the store's.

    Raises:
        DminError: the method reads no gradients, or ignores the query.
    """

    def __init__(self, method: Method, timesteps: Sequence[float]) -> None:
        odd = None if method.by_query else "ignores the query"
        if method.requires.images or not (method.requires.readouts or method.requires.model):
            odd = "does not compare gradients at timesteps"
        if odd:
            raise DminError(
                f"retrieve.timesteps={list(timesteps)}: method={method.name} {odd}. Choose a "
                f"method that compares gradients, such as dmin, or leave out retrieve.timesteps."
            )
        self.method, self.requires = method, method.requires
        self.timesteps: tuple[float, ...] = tuple(float(t) for t in timesteps)
        self.name: str = f"{method.name} at t = {', '.join(f'{t:g}' for t in self.timesteps)}"
        vars(self).update(check=method.check, notes=method.notes)  # are those of the method

    def fit(self, train: FeatureSet) -> None:
        """Fit the method to the examples at these timesteps."""
        self._all = len(train.store.layout.timesteps)
        self._kept = places_of(self.timesteps, train.store.layout.timesteps)
        self.method.fit(_side_at(train, self._kept))

    def transform_query(self, queries: ExampleBlock) -> Any:
        """Prepare the queries at these timesteps."""
        found = self.method.transform_query(self._at(queries))
        if not isinstance(found, InnerProduct):
            return found
        return replace(found, queries=self._whole(found.queries, 2))

    def score(self, queries: Any, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        if isinstance(queries, InnerProduct):
            return queries.scores(train)
        return self.method.score(queries, self._at(train))

    def contributions(self, queries: Any, train: ExampleBlock) -> Tensor | None:
        """Return what groups add at all timesteps, ``[Q, n, T, G]``, zero at the others."""
        if isinstance(queries, InnerProduct):
            return queries.contributions(train)
        found = self.method.contributions(queries, self._at(train))
        return None if found is None else self._whole(found, 2)

    def limit(self, queries: Any, sign: int = 1) -> Tensor | None:
        """Return the method's."""
        return self.method.limit(queries, sign)

    def _at(self, block: ExampleBlock) -> ExampleBlock:
        """Return examples at these timesteps."""
        kept = self._kept
        return replace(
            block,
            features={name: rows[:, :, kept] for name, rows in block.features.items()},
            norms={name: norms[:, :, kept] for name, norms in block.norms.items()},
            checkpoints=[self._at(each) for each in block.checkpoints],
            trajectory=[self._at(each) for each in block.trajectory],
        )

    def _whole(self, values: Tensor, axis: int) -> Tensor:
        """Return values at these timesteps, zero at the store's other timesteps."""
        shape = [*values.shape[:axis], self._all, *values.shape[axis + 1 :]]
        return values.new_zeros(shape).index_copy(axis, torch.tensor(self._kept), values)


def _side_at(side: FeatureSet, kept: list[int]) -> FeatureSet:
    """Return training examples restricted to some timesteps."""
    origin: Any = copy.copy(side.origin)
    if origin is not None:
        origin.timesteps = tuple(origin.timesteps[place] for place in kept)
    return FeatureSet(
        _StoreAt(side.store, kept),
        side.dataset,
        checkpoints={name: _side_at(each, kept) for name, each in side.checkpoints.items()},
        repeats=side.repeats,
        origin=origin,
        encodings=side.encodings,
    )


class _StoreAt(Store):
    """The part of a store that methods are fitted to, at some of its timesteps."""

    def __init__(self, store: Store, kept: list[int]) -> None:
        vars(self).update(vars(store))
        self._kept = kept

    @property
    def layout(self) -> Layout:
        whole = self.manifest.layout
        return replace(whole, timesteps=tuple(whole.timesteps[place] for place in self._kept))

    def rows(self, readout: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return super().rows(readout, indices)[:, :, self._kept]

    def norms(self, readout: str) -> np.ndarray:
        return super().norms(readout)[:, :, self._kept]

    def losses(self) -> np.ndarray:
        return super().losses()[:, :, self._kept]
