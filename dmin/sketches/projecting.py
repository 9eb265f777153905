"""Two-sided projections of layer calls on a CPU, in all threads that torch may use.

What an example's positions add is cut into fixed parts, which are added up in order: the result is
the same to the bit for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmin.layer_gradients import Correlation, Outer, wide
from dmin.sketches.forming import side_by_side, starts_of
from dmin.sketches.layouts import Planes, kernels
from dmin.sketches.threads import in_threads


class Signs(NamedTuple):
    """A matrix of signs, hashed when it is needed and not kept.

    Args:
        key: of the signs.
        to: rows.
        size: columns.
    """

    key: int
    to: int
    size: int

    def panels(self, lanes: int) -> np.ndarray:
        """Return the matrix divided by √to, so many rows side by side, ``[panels, size, lanes]``.

        Rows beyond the last are zeros.
        """
        loops = kernels()
        words = loops.sign_words(self.key, self.to * self.size)
        out = np.empty((-(-self.to // lanes), self.size, lanes), np.float32)
        scale = np.float32(self.to**-0.5)
        in_threads(len(out), lambda i: loops.sign_panel(words, i * lanes, self.to, scale, out[i]))
        return out

    def matrix(self) -> Tensor:
        """Return the matrix divided by √to, transposed: ``[size, to]``."""
        return torch.from_numpy(self.panels(self.to)[0])


class Placed(NamedTuple):
    """Sides of a matrix, outputs and inputs, each with a sign and a place for each entry."""

    keys: tuple[tuple[int, int], ...]  # of signs, and of places
    sizes: tuple[int, int]
    shares: tuple[int, int]


class _Work(NamedTuple):
    """What of a layer call can be done apart: some examples, and parts of each."""

    add: Callable[[slice, tuple[int, int], np.ndarray], None]  # examples, parts, totals
    parts: int
    bytes: int  # of one example's factors


def add_projected(
    factors: Outer | Correlation, left: Signs, right: Signs, rows: Tensor, budget: int
) -> None:
    """Add ``A G Bᵀ`` of one layer call's gradients, which are not formed.

    Args:
        factors: outer products, or correlations that :meth:`Planes.serves`.
        left: A.
        right: B.
        rows: float32 ``[batch, k₁ · k₂]``, changed in place.
        budget: bytes that copies of factors may take at once.
    """
    work = _work(factors, left, right)
    batch, threads = len(rows), torch.get_num_threads()
    # Threads take some examples each, or share one in parts that are added up in order.
    step = max(1, min(-(-batch // threads), budget // (threads * work.bytes)))
    parts = work.parts if batch < threads else 1
    totals = np.zeros((parts, batch, left.to * right.to), np.float32)

    def part(i: int) -> None:
        first, p = i // parts * step, i % parts
        some = work.parts * p // parts, work.parts * (p + 1) // parts
        work.add(slice(first, first + step), some, totals[p, first : first + step])

    in_threads(-(-batch // step) * parts, part)
    rows += torch.from_numpy(totals.sum(0))


def add_placed(gradients: Sequence[Tensor], sides: Sequence[Placed], rows: Tensor) -> None:
    """Add gradients whose sides have a sign and a place for each entry.

    Args:
        gradients: of each parameter, ``[batch, out · in]``.
        sides: of each parameter.
        rows: as for :func:`add_projected`.
    """
    sums = rows if rows.is_contiguous() else torch.zeros(rows.shape)
    together = side_by_side(gradients), starts_of(gradients)
    keys, sizes, shares = zip(*sides, strict=True)
    map_ = np.array(keys, np.uint32), np.array(sizes), np.array(shares)
    kernels().add_placed(*together, *map_, sums.numpy())
    if sums is not rows:
        rows += sums


def _work(factors: Outer | Correlation, left: Signs, right: Signs) -> _Work:
    if isinstance(factors, Outer):
        return _tokens(factors, left, right)
    layer = Planes(factors)
    return (_transformed if _transforms(layer, right.to) else _patches)(layer, left, right)


def _tokens(factors: Outer, left: Signs, right: Signs) -> _Work:
    """Return the work on outer products."""
    loops, both = kernels(), (factors.output_gradient, factors.input)
    matrices = left.panels(loops.COLUMNS), right.panels(loops.COLUMNS)
    positions = factors.input.shape[1]
    turned = [x.stride(1) == 1 and x.stride(2) == positions > 1 for x in both]
    through = loops.Walk(1, positions, 0, 1, _FIRST), loops.Walk(1, positions, 0, 1, _FIRST[:0])
    walks = [through[0] if each else through[1] for each in turned]

    def add(examples: slice, some: tuple[int, int], totals: np.ndarray) -> None:
        d, a = (
            _numbers(x[examples].transpose(1, 2) if each else x[examples])
            for x, each in zip(both, turned, strict=True)
        )
        which = some[0] * loops.CHUNK, min(positions, some[1] * loops.CHUNK)
        loops.project(d, a, *walks, which, *matrices, (left.to, right.to), totals)

    return _Work(add, -(-positions // loops.CHUNK), 4 * sum(x[0].numel() for x in both))


def _patches(layer: Planes, left: Signs, right: Signs) -> _Work:
    """Return the work on a convolution's inputs, patch by patch."""
    loops, factors = kernels(), layer.factors
    layer = Planes(factors, transform=False)
    matrices = left.panels(loops.COLUMNS), right.panels(loops.COLUMNS)
    positions, walks = prod(layer.positions), (layer.own, layer.walk)

    def add(examples: slice, some: tuple[int, int], totals: np.ndarray) -> None:
        d, a = factors.output_gradient[examples].flatten(2), factors.input[examples]
        a = a if a.ndim == 4 else a[:, :, None]
        a = F.pad(a, layer.borders) if any(layer.borders) else a
        which = some[0] * loops.CHUNK, min(positions, some[1] * loops.CHUNK)
        into = which, *matrices, (left.to, right.to), totals
        loops.project(_numbers(d), _numbers(a.flatten(2)), *walks, *into)

    return _Work(add, -(-positions // loops.CHUNK), layer.bytes)


def _transformed(layer: Planes, left: Signs, right: Signs) -> _Work:
    """Return the work on a 3 × 3 convolution with many positions, which is formed in part."""
    loops, factors = kernels(), layer.factors
    matrices = left.panels(loops.COLUMNS), right.panels(loops.ROWS)

    def add(examples: slice, some: tuple[int, int], totals: np.ndarray) -> None:
        d, a = factors.output_gradient[examples].flatten(2), factors.input[examples]
        into = some, *matrices, (left.to, right.to), totals
        loops.project_transformed(_numbers(d), _numbers(a), layer.padding, layer.own, *into)

    return _Work(add, len(matrices[0]), layer.bytes)


def _transforms(layer: Planes, share: int) -> bool:
    """Return whether forming k₁ kernels and projecting them takes less than projecting patches."""
    loops, size, tiles = kernels(), prod(layer.positions), prod(layer.tiles)
    whole = layer.positions == layer.d_size and layer.transforms
    return whole and loops.PRODUCTS * tiles + 9 * share + loops.TRANSFORM_COST < 9 * size


def _numbers(x: Tensor) -> np.ndarray:
    return wide(x).detach().contiguous().numpy()


_FIRST = np.zeros(1, np.int64)
