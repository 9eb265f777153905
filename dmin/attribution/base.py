"""What an attribution method is: two sides of examples in, a score for each pair out."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dmin.data.base import Dataset, Example
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import fingerprint
from dmin.store import Layout, Store

if TYPE_CHECKING:
    from dmin.attribution.curvature.curvature import Curvature
    from dmin.diffusion.noise import Noise
    from dmin.gradients.parameters import Parameters
    from dmin.models.base import DiffusionModel
    from dmin.sketches import Sketch


@dataclass(frozen=True)
class Requires:
    """What a method needs to be there.

    Args:
        readouts: gradients it reads from the store.
        images: it compares the images themselves, so both datasets must be at hand.
        checkpoints: names (paths) of further checkpoints whose stores it reads.
        journey: it reads the queries' states along their generation.
        model: it runs the model, so model, examples, noise and sketch must be at hand.
    """

    readouts: tuple[str, ...] = ("loss",)
    images: bool = False
    checkpoints: tuple[str, ...] = ()
    journey: bool = False
    model: bool = False


class FeatureSource(Protocol):
    """What the features of a store were made with; a ``GradientCollector`` is one."""

    model: DiffusionModel
    attributed: Parameters
    sketch: Sketch  # bound to these
    timesteps: tuple[float, ...]
    noise: Noise

    def describe(self) -> dict[str, Any]:
        """Return what the store's manifest has as its features."""

    def cached_encodings(
        self, store: Store, ids: Sequence[str], root: str | Path | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]] | None:
        """Return x0 and condition of examples as collecting kept them; None if it did not."""


@dataclass(frozen=True)
class ExampleBlock:
    """Consecutive examples of one side, with what the method requires of them."""

    first: int  # row of the first example in its store
    ids: Sequence[str]
    features: dict[str, Tensor] = field(default_factory=dict)  # readout -> [n, D, T, G, k]
    norms: dict[str, Tensor] = field(default_factory=dict)  # readout -> [n, D, T, G]
    images: Tensor | None = None  # [n, C, H, W] in [0, 1]
    examples: Sequence[Example] = ()  # for a method that runs the model
    checkpoints: Sequence[ExampleBlock] = ()  # the same examples under each further checkpoint
    journey: Sequence[ExampleBlock] = ()  # of queries: their states while they were generated


class FitCache:
    """Curvatures that were fitted to a side, kept for other methods that fit the same to it.

    Attributes:
        kept: by what they were fitted to and how, each with the seconds that it took.
        used: keys that were asked for, in this order.
        memory: bytes that may be kept; those asked for longest ago leave first.
    """

    def __init__(self, memory: int = 1 << 30) -> None:
        self.kept: dict[Hashable, tuple[Curvature, float]] = {}
        self.used: list[Hashable] = []
        self.memory = memory

    def get(self, key: Hashable, fit: Callable[[], Curvature]) -> Curvature:
        """Return what was fitted under a key before, or fit it."""
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
    """One side of the comparison, queries or training examples: a store, and perhaps more.

    Args:
        store: the features.
        dataset: the examples, needed by methods that look at images; found by their ids.
        checkpoints: the same examples under further checkpoints of the model, by their name.
        journey: of queries: stores of the same ids, one for each state that was recorded while
            they were generated.
        origin: what the features were made with, for methods that run the model themselves.
        encodings: where collecting kept latents and prompts, if it did (``keep_encodings``); beside
            the store if None. Methods that run the model read them and do not encode again.
    """

    def __init__(
        self,
        store: Store,
        dataset: Dataset | None = None,
        *,
        checkpoints: Mapping[str, FeatureSet] | None = None,
        journey: Sequence[FeatureSet] = (),
        origin: FeatureSource | None = None,
        encodings: str | Path | None = None,
    ) -> None:
        self.store = store
        self.dataset = dataset
        self.checkpoints = dict(checkpoints or {})
        self.journey = list(journey)
        self.origin = origin
        self.encodings = encodings
        self.fits = FitCache()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.store)

    def block(self, rows: Sequence[int] | np.ndarray, requires: Requires) -> ExampleBlock:
        """Return chosen rows, in the order given, with what a method requires."""
        store, readouts = self.store, requires.readouts
        ids = [store.ids[row] for row in rows]
        alone = replace(requires, checkpoints=(), journey=False)
        return ExampleBlock(
            first=int(rows[0]),
            ids=ids,
            features={name: torch.from_numpy(store.rows(name, rows)) for name in readouts},
            norms={name: torch.from_numpy(self._norms(name)[rows]) for name in readouts},
            images=torch.stack([self.image(i) for i in ids]) if requires.images else None,
            examples=[self.example(i) for i in ids] if requires.model else (),
            checkpoints=[self.checkpoints[c].block(rows, alone) for c in requires.checkpoints],
            journey=[s.block(rows, alone) for s in self.journey] if requires.journey else (),
        )

    def blocks(self, requires: Requires, rows: int = 1024) -> Iterator[ExampleBlock]:
        """Yield the side block by block, reading only what a method requires."""
        for start in range(0, len(self), rows):
            yield self.block(np.arange(start, min(start + rows, len(self))), requires)

    def image(self, id: str) -> Tensor:
        """Return the image of an example, ``[C, H, W]`` in [0, 1]; see :meth:`example`."""
        return self.example(id).image

    def example(self, id: str) -> Example:
        """Return an example by its id.

        Raises:
            DminError: there is no dataset, or it has no such example.
        """
        if self.dataset is None:
            raise DminError(
                "this method looks at the images, but only a store was given. Give the dataset as "
                "well: FeatureSet(store, dataset)."
            )
        if id not in self._positions:
            raise DminError(
                f"the store has an example {id!r} that the dataset lacks: the dataset changed "
                f"since collection. Restore it, or collect again."
            )
        return self.dataset[self._positions[id]]

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
class InnerProduct:
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

    def fit(self, train: FeatureSet) -> None:  # noqa: B027 (most methods learn nothing)
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

    def group_contributions(
        self, queries: Any, train: ExampleBlock, layout: Layout
    ) -> Tensor | None:
        """Return what each group of layers adds at each timestep, or None if nobody can say.

        A score that is one inner product (:meth:`linear`) is the sum of what its groups have. Where
        an inner product ``u = Σ_g u_g`` is raised to a power, a group has the share ``u_g / u`` of
        that: its Aumann–Shapley value, what it adds while all groups grow in step from nothing
        (Aumann & Shapley, "Values of Non-Atomic Games", 1974); of a square this is its Shapley
        value as well. Shares add up to the score; one is negative where a group works against the
        others.

        Args:
            queries: what :meth:`transform_query` returned.
            train: the examples.
            layout: of the stores.

        Returns:
            ``[queries, n, T, G]``.
        """
        linear = self.linear(queries, layout)
        if linear is None:
            return None
        rows, scale = train.features[linear.readout], linear.scale
        if scale == "unit":
            rows = torch.nn.functional.normalize(rows.flatten(3), dim=-1).view_as(rows)
        elif scale == "norm":
            length = train.norms[linear.readout].square().sum(-1).sqrt()
            rows = rows * length[..., None, None]
        return torch.einsum("qdtgk,ndtgk->qntg", linear.queries, rows)

    def notes(self) -> dict[str, str]:
        """Return what fitting found that a reader of the scores should know, by topic."""
        return {}

    def linear(self, queries: Any, layout: Layout) -> InnerProduct | None:
        """Return the scores as one inner product, or None if they are not.

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


def check_pair(queries: FeatureSet, train: FeatureSet, method: Method) -> None:
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
    if method.requires.model:
        _check_origin(queries, train, method)
    if method.requires.journey:
        _check_journey(queries, method)
    for name in method.requires.checkpoints:
        pair = [_checkpoint(side, name, method) for side in (queries, train)]
        check_comparable(pair[0].store, pair[1].store)


def _check_origin(queries: FeatureSet, train: FeatureSet, method: Method) -> None:
    """Refuse a model that is not the one the features were made with."""
    guidance = queries.store.manifest.dataset.get("guidance")
    if guidance is not None:
        raise DminError(
            f"the queries were collected with model.query_guidance={guidance:g}, but method="
            f"{method.name} computes their gradients anew, without guidance. Set "
            f"model.query_guidance=null, or take a method that reads the store."
        )
    if train.origin is None:
        raise DminError(
            f"method={method.name} runs the model itself, but only a store was given. Give what "
            f"made it as well: FeatureSet(store, dataset, origin=collector)."
        )
    if fingerprint(train.origin.describe()) != fingerprint(train.store.manifest.features):
        raise DminError(
            f"method={method.name} was given another model, noise or sketch than "
            f"{train.store.path} was collected with. Give the collector that made it."
        )


def _check_journey(queries: FeatureSet, method: Method) -> None:
    """Refuse queries of whose generation nothing is known."""
    from dmin.store import check_comparable

    if not queries.journey:
        raise DminError(
            f"method={method.name} needs what the queries looked like while they were generated. "
            f"Generate them with queries=generated queries.journey=10 (FeatureSet(…, journey=[…]))."
        )
    for state in queries.journey:
        state.store.require_complete()
        check_comparable(state.store, queries.store)
        _check_ids(state.store, queries.store)


def _checkpoint(side: FeatureSet, name: str, method: Method) -> FeatureSet:
    """Return a side's examples under a checkpoint, or say that they are not there."""
    if name not in side.checkpoints:
        raise DminError(
            f"method={method.name} reads the checkpoint {name!r}, of which {side.store.path} is "
            f"not accompanied ({', '.join(side.checkpoints) or 'by none'}). Collect it, and give "
            f"FeatureSet(store, checkpoints={{{name!r}: FeatureSet(…)}})."
        )
    other = side.checkpoints[name]
    other.store.require_complete()
    _check_ids(other.store, side.store)
    return other


def _check_ids(other: Store, store: Store) -> None:
    if other.ids != store.ids:
        raise DminError(
            f"{other.path} and {store.path} do not hold the same examples in the same order. "
            f"Collect both from one dataset."
        )
