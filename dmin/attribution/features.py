"""The input of a method: features of queries or training examples, with images and models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.curvature.curvature import Curvature
from dmin.data.base import Dataset, Example
from dmin.data.ids import file_at, positions_of
from dmin.runtime.errors import DminError
from dmin.store import Store

if TYPE_CHECKING:
    from dmin.diffusion.noise import Noise
    from dmin.gradients.parameters import Parameters
    from dmin.models.base import DiffusionModel
    from dmin.sketches import Sketch


@dataclass(frozen=True)
class Requires:
    """The requirements of a method.

    Args:
        readouts: gradients it reads from the store.
        images: it compares images, so both datasets must be given.
        checkpoints: names (paths) of further checkpoints whose stores it reads.
        trajectory: it reads the queries' states along their generation.
        model: it runs the model, so model, examples, noise and sketch must be given.
    """

    readouts: tuple[str, ...] = ("loss",)
    images: bool = False
    checkpoints: tuple[str, ...] = ()
    trajectory: bool = False
    model: bool = False


class FeatureSource(Protocol):
    """The collector of a store's features; ``GradientCollector`` implements it."""

    model: DiffusionModel
    attributed: Parameters
    sketch: Sketch  # bound to these
    timesteps: tuple[float, ...]
    noise: Noise

    def describe(self) -> dict[str, Any]:
        """Return the settings that the manifest records as features."""

    def cached_encodings(
        self, store: Store, ids: Sequence[str], root: str | Path | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        """Return the cached x0 and condition of examples; None if they were not kept."""


@dataclass(frozen=True)
class ExampleBlock:
    """Consecutive examples, with what the method requires of them."""

    first: int  # row of the first example in its store
    ids: Sequence[str]
    features: dict[str, Tensor] = field(default_factory=dict)  # readout -> [n, D, T, G, k]
    norms: dict[str, Tensor] = field(default_factory=dict)  # readout -> [n, D, T, G]
    images: Tensor | None = None  # [n, C, H, W] in [0, 1]
    examples: Sequence[Example] = ()  # for a method that runs the model
    checkpoints: Sequence[ExampleBlock] = ()  # the same examples under each further checkpoint
    trajectory: Sequence[ExampleBlock] = ()  # of queries: their states while they were generated


class FitCache:
    """A cache of curvatures, for other methods that fit the same to the same examples.

    Attributes:
        kept: by what was fitted and how, each with the seconds that it took.
        used: keys that were requested, in this order.
        memory: bytes that may be kept; the least recently used are dropped first.
    """

    def __init__(self, memory: int = 1 << 30) -> None:
        self.kept: dict[Hashable, tuple[Curvature, float]] = {}
        self.used: list[Hashable] = []
        self.memory = memory

    def get(self, key: Hashable, fit: Callable[[], Curvature]) -> Curvature:
        """Return the fit cached under a key, or compute it."""
        if key in self.kept:
            found, seconds = self.kept.pop(key)  # to the end
        else:
            start = time.perf_counter()
            found, seconds = fit(), time.perf_counter() - start
        self.used.append(key)
        while (
            self.kept and sum(c.nbytes for c, _ in self.kept.values()) + found.nbytes > self.memory
        ):
            self.kept.pop(next(iter(self.kept)))
        self.kept[key] = found, seconds
        return found


class FeatureSet:
    """Queries or training examples: their store, with datasets, checkpoints and the collector.

    Args:
        store: the features.
        dataset: the examples, needed by methods that look at images; found by their ids.
        checkpoints: the same examples under further checkpoints of the model, by their name.
        trajectory: for queries: stores of the same ids, one for each recorded state
            of their generation.
        repeats: whether examples count by their repeats in an epoch (`counts`).
        origin: the collector of the features, for methods that run the model.
        encodings: folder of cached latents and prompts, if they were kept (``keep_encodings``);
            next to the store if None. Methods that run the model read them instead of encoding
            again.
    """

    def __init__(
        self,
        store: Store,
        dataset: Dataset | None = None,
        *,
        checkpoints: Mapping[str, FeatureSet] | None = None,
        trajectory: Sequence[FeatureSet] = (),
        repeats: bool = True,
        origin: FeatureSource | None = None,
        encodings: str | Path | None = None,
    ) -> None:
        self.store = store
        self.dataset = dataset
        self.checkpoints: dict[str, FeatureSet] = dict(checkpoints or {})
        self.trajectory: list[FeatureSet] = list(trajectory)
        self.repeats = repeats
        self.origin = origin
        self.encodings = encodings
        self.fits: FitCache = FitCache()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.store)

    @cached_property
    def counts(self) -> Tensor | None:
        """How often an epoch passed each example, float64 ``[N]``, by their metadata's ``repeats``.

        None where it is once each. In a method's sums over the side an example counts so often.

        Raises:
            DminError: one is not a positive number.
        """
        told = [each.get("repeats", 1) for each in self.store.metadata] if self.repeats else []
        wrong = [n for n in told if not isinstance(n, int | float) or not 0 < n < math.inf]
        if wrong:
            raise DminError(
                f"{self.store.path} has an example with repeats={wrong[0]!r} in its metadata, "
                f"which is not a number of passes in an epoch. Fix it (dmin store metadata), or "
                f"count each example once: collect.repeats=false."
            )
        return None if set(told) <= {1} else torch.tensor(told, dtype=torch.float64)

    @property
    def total(self) -> float:
        """The sum of the `counts`, the denominator of weighted means."""
        return len(self) if self.counts is None else float(self.counts.sum())

    def counted(self, values: Tensor, block: ExampleBlock, root: bool = False) -> Tensor:
        """Return values ``[n·c, ...]`` of a block times its counts, or their square roots."""
        if self.counts is None:
            return values
        counts = self.counts[block.first : block.first + len(block.ids)]
        counts = counts.repeat_interleave(len(values) // len(counts))
        shape = (-1, *[1] * (values.ndim - 1))
        return values * (counts.sqrt() if root else counts).to(values).view(shape)

    def counts_of(self, rows: Sequence[int]) -> Tensor | None:
        """Return the `counts` of some examples."""
        return None if self.counts is None else self.counts[list(rows)]

    def block(self, rows: Sequence[int] | np.ndarray, requires: Requires) -> ExampleBlock:
        """Return chosen rows, in the order given, with what a method requires."""
        store, readouts = self.store, requires.readouts
        ids = [store.ids[row] for row in rows]
        alone = replace(requires, checkpoints=(), trajectory=False)
        return ExampleBlock(
            first=int(rows[0]),
            ids=ids,
            features={name: torch.from_numpy(store.rows(name, rows)) for name in readouts},
            norms={name: torch.from_numpy(self._norms(name)[rows]) for name in readouts},
            images=torch.stack([self.image(i) for i in ids]) if requires.images else None,
            examples=[self.example(i) for i in ids] if requires.model else (),
            checkpoints=[self.checkpoints[c].block(rows, alone) for c in requires.checkpoints],
            trajectory=[
                state.block(rows, alone) for state in self.trajectory if requires.trajectory
            ],
        )

    def blocks(self, requires: Requires, rows: int = 1024) -> Iterator[ExampleBlock]:
        """Yield blocks of examples, reading only what a method requires."""
        for start in range(0, len(self), rows):
            yield self.block(np.arange(start, min(start + rows, len(self))), requires)

    def image(self, id: str) -> Tensor:
        """Return the image of an example, ``[C, H, W]`` in [0, 1]; see :meth:`example`."""
        return self.example(id).image

    def file(self, id: str) -> Path | None:
        """Return the file of an example's image, if it has one."""
        if self.dataset is None or id not in self._places:
            return None
        return file_at(self.dataset, self._places[id])

    def example(self, id: str) -> Example:
        """Return an example by its id.

        Raises:
            DminError: there is no dataset, or it has no such example.
        """
        if self.dataset is None:
            raise DminError(
                "this method compares images, but only a store was given. Also give the "
                "dataset: FeatureSet(store, dataset)."
            )
        if id not in self._places:
            raise DminError(
                f"the store has an example {id!r} that the dataset lacks: the dataset has changed "
                f"since it was collected. Restore it, or collect again."
            )
        return self.dataset[self._places[id]]

    @cached_property
    def _places(self) -> dict[str, int]:
        assert self.dataset is not None
        return positions_of(self.dataset)

    @cached_property
    def _norms(self) -> Callable[[str], np.ndarray]:
        return cache(self.store.norms)
