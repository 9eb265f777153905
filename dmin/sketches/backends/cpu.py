"""Fold per-example gradients on a CPU while they are formed, in all threads that torch may use.

The rows of each example's gradient are split into parts, which are folded separately and then added
up in order: the result is the same to the bit for any number of threads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmin.gradients.factors import Correlation, Dense, GradientFactors, Outer, Sum
from dmin.sketches.backends.base import GroupRows, in_positions
from dmin.sketches.backends.cpu_layouts import Layout, Planes, Tokens, kernels
from dmin.sketches.backends.cpu_spectra import add_spectra
from dmin.sketches.backends.cpu_threads import in_threads, with_scratch
from dmin.sketches.backends.torch import TorchBackend
from dmin.sketches.maps import BlockCyclicMap, Map, TensorSketchMap, as_matrices

if TYPE_CHECKING:
    from dmin.sketches.backends.cpu_kernels import Fold

PARTS = 4  # an example's rows are split into so many parts if there are fewer examples …
PART = 1 << 15  # … and a part has at least so many entries


BATCHED = 1 << 16  # gradients of vectors are batched up to so many entries per example
_NO_BITS, _NO_PLACES = np.empty(0, np.uint32), np.empty(0, np.int32)
_NO_SIDE = _NO_PLACES, np.empty(0, np.float32)


class CpuBackend(TorchBackend):
    """Compiled loops for rows in single precision; torch for maps of other kinds.

    A model has many small vectors (biases, scales of norms). Their gradients are batched and
    folded in one call.

    Args:
        budget: most bytes of formed gradients or packed factors in memory at once.
    """

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self._batched: dict[GroupRows, list[tuple[BlockCyclicMap, Tensor]]] = defaultdict(list)
        self._entries = 0  # batched entries per example

    def fold(self, factors: GradientFactors, map_: Map, rows: GroupRows) -> None:
        """Fold gradients while they are formed."""
        if isinstance(map_, BlockCyclicMap) and len(map_.shape) < 2 and isinstance(factors, Dense):
            self._batched[rows].append((map_, factors.gradient.reshape(factors.batch, -1)))
            self._entries += map_.width
            if self._entries > BATCHED:
                self.finish()
        elif isinstance(map_, BlockCyclicMap | TensorSketchMap):
            fold_factors(factors, map_, rows, self.budget)
        else:
            super().fold(factors, map_, rows)

    def add_spectra(
        self, factors: GradientFactors, map_: TensorSketchMap, spectrum: Tensor
    ) -> None:
        """Count-sketch, transform and multiply a few positions at a time, within the cache."""
        assert in_positions(factors)
        add_spectra(factors, map_, spectrum)

    def scatter(self, gradient: Tensor, bucket: Tensor, sign: Tensor, values: Tensor) -> None:
        """Add signed gradients at buckets, each example in one thread."""
        loops, places = kernels(), (bucket.numpy(), sign.numpy())

        def work(i: int) -> None:
            loops.scatter(gradient[i].float().numpy(), *places, values[i].numpy())

        in_threads(len(gradient), work)

    def finish(self) -> None:
        """Fold the batched gradients."""
        batched, self._batched, self._entries = self._batched, defaultdict(list), 0
        for rows, some in batched.items():
            maps, gradients = zip(*some, strict=True)
            fold_vectors(gradients, maps, rows)


def taps_first(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """Return gradients ``[batch, *shape]`` as ``[batch, taps, out, in]``, a view if possible."""
    taps, out, width = as_matrices(shape)
    return gradient.reshape(-1, out, width, taps).permute(0, 3, 1, 2)


def fold_factors(
    factors: GradientFactors, map_: BlockCyclicMap | TensorSketchMap, rows: GroupRows, budget: int
) -> None:
    """Add the folded gradients of one parameter to the rows of a batch.

    Args:
        factors: the gradients.
        map_: the map of the parameter.
        rows: rows with float32 values.
        budget: most bytes of formed gradients or packed factors in memory at once.
    """
    shape, measure = map_.shape, rows.squared_norm is not None
    with _sums(rows) as sums:
        work = _Work(as_matrices(shape), _compiled(map_), *sums, measure)
        layouts = _layouts(factors, measure)
        if layouts is None:
            _fold_dense(factors, shape, work, budget)
        for layout in layouts or ():
            if factors.batch < PARTS and prod(shape) >= PARTS * PART:
                _fold_in_parts(layout, work)
            else:
                _fold_examples(layout, work, budget)


@contextmanager
def _sums(rows: GroupRows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield arrays to which the loops add rows and squared norms; on exit, rows include them.

    The loops need contiguous rows. With several groups, rows are not, and a copy is used.
    """
    values, norms = rows.values, rows.squared_norm
    sums = values if values.is_contiguous() else torch.zeros(values.shape)
    squares = np.zeros(len(values), np.float32)
    yield sums.numpy(), squares
    if sums is not values:
        values += sums
    if norms is not None:
        norms += torch.from_numpy(squares)


class _Work(NamedTuple):
    """The map and the outputs of a fold."""

    shape: tuple[int, int, int]  # taps, out, in
    fold: Fold
    rows: np.ndarray  # [batch, k], to which folded gradients are added
    squares: np.ndarray  # [batch], to which squared norms are added …
    measure: bool  # … if True


def _fold_examples(layout: Layout, work: _Work, budget: int) -> None:
    """Fold a layer call, as many examples at a time as the budget for copies allows."""
    threads = torch.get_num_threads()
    group = threads * max(1, budget // (threads * layout.bytes))
    for start in range(0, len(work.rows), group):
        _fold_group(layout, work, slice(start, start + group))


def _fold_group(layout: Layout, work: _Work, examples: slice) -> None:
    """Fold some examples of a layer call, divided evenly over the threads."""
    _, out, width = work.shape
    d, a = layout.arrays(examples)
    rows, squares = work.rows[examples], work.squares[examples]
    step = -(-len(d) // torch.get_num_threads())

    def some(i: int) -> None:
        own = slice(i * step, (i + 1) * step)
        into = out, width, work.fold, rows[own], squares[own], work.measure
        with_scratch(layout.fold, d[own], a[own], *layout.settings, *into)

    in_threads(-(-len(d) // step), some)


def _fold_in_parts(layout: Layout, work: _Work) -> None:
    """Fold a layer call of few examples, each divided over threads; add the parts in order."""
    _, out, width = work.shape
    batch = len(work.rows)
    total = np.zeros((batch, PARTS, work.fold.length), np.float32)
    squares = np.zeros((batch, PARTS), np.float32)
    packed: list[Any] = [None] * batch

    def pack(i: int) -> None:
        packed[i] = layout.pack(i)

    def part(i: int) -> None:
        e, p = divmod(i, PARTS)
        panels = len(packed[e][0])
        which = panels * p // PARTS, panels * (p + 1) // PARTS
        into = out, width, work.fold, *which, total[e, p], work.measure
        squares[e, p] = layout.of_part(*packed[e], *into)

    in_threads(batch, pack)
    in_threads(batch * PARTS, part)
    kernels().add_parts(total, work.rows)
    np.add(work.squares, squares.sum(1), out=work.squares)


def fold_vectors(
    gradients: Sequence[Tensor], maps: Sequence[BlockCyclicMap], rows: GroupRows
) -> None:
    """Add the folded gradients of vectors to the rows of a batch.

    Args:
        gradients: gradients of each vector, ``[batch, n]``.
        maps: map of each vector; all have the same block length.
        rows: rows with float32 values.
    """
    together = torch.cat([gradient.detach().float() for gradient in gradients], 1).numpy()
    starts = np.cumsum([0, *(gradient.shape[1] for gradient in gradients)])
    words = np.array([(map_.sign, map_.offset) for map_ in maps], np.uint32)
    with _sums(rows) as sums:
        how = maps[0].block, *sums, rows.squared_norm is not None
        kernels().fold_vectors(together, starts, words, *how)


def _compiled(map_: BlockCyclicMap | TensorSketchMap) -> Fold:
    """Return a map for the loops. Their folded row is longer than k, and wrapped at the end."""
    loops = kernels()
    if isinstance(map_, BlockCyclicMap):
        keys = map_.sign, map_.words, map_.offset, map_.blocks
        hashed = loops.hashed_map(*keys, map_.dim)
        return loops.Fold(*hashed, map_.block, map_.dim + map_.block, *_NO_SIDE, *_NO_SIDE)
    sides = map_.sides(torch.device("cpu"))
    arrays = [x.numpy() for bucket, sign in sides for x in (bucket.int(), sign.float())]
    return loops.Fold(_NO_BITS, _NO_PLACES, 0, 2 * map_.dim, *arrays)


def _fold_dense(factors: GradientFactors, shape: Sequence[int], work: _Work, budget: int) -> None:
    """Form the gradients with torch, and fold them."""
    loops, size = kernels(), prod(shape)
    step = max(1, budget // max(4, 4 * size))
    for start in range(0, factors.batch, step):
        part = factors[start : start + step]
        formed = part.gradient if isinstance(part, Dense) else part.dense()
        gradient = taps_first(formed.detach().float(), shape).numpy()

        def some(i: int, n: int = 1, start: int = start, gradient: np.ndarray = gradient) -> None:
            own = slice(start + i, start + i + n)
            into = work.fold, work.rows[own], work.squares[own], work.measure
            loops.fold_formed(gradient[i : i + n], *into)

        if size < PART:
            some(0, len(gradient))
        else:
            in_threads(len(gradient), some)
        del gradient, formed, part, some  # free this slice before the next one is formed


def _layouts(factors: GradientFactors, measure: bool) -> list[Layout] | None:
    """Return how factors are packed for the kernels, or None if they must be formed by torch."""
    parts = factors.parts if isinstance(factors, Sum) else [factors]
    outer = [part for part in parts if isinstance(part, Outer)]
    if len(outer) == len(parts):
        if measure and len(parts) > 1:  # the norm of a sum needs the positions of all calls
            d = torch.cat([part.output_gradient for part in outer], 1)
            outer = [Outer(d, torch.cat([part.input for part in outer], 1))]
        return [Tokens(part) for part in outer]
    if measure and len(parts) > 1:
        return None
    planes = [part for part in parts if in_positions(part) and isinstance(part, Correlation)]
    return [Planes(part) for part in planes] if len(planes) == len(parts) else None
