"""Two-sided projections of layer calls on a CPU, in all threads that torch may use.

What an example's positions add is cut into fixed parts, which are added up in order: the result is
the same to the bit for any number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmin.gradients.layers import Correlation, Outer, wide
from dmin.sketches.backends.cpu import side_by_side, starts_of
from dmin.sketches.backends.packing import Planes, kernels
from dmin.sketches.backends.threads import in_threads, with_scratch

# Multiplications that take less time than it takes to wake the other threads.
SERIAL = 1 << 22


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

        def panel(i: int) -> None:
            loops.sign_panel(words, i * lanes, self.to, scale, out[i])

        if out.size < SERIAL // 8:
            for i in range(len(out)):
                panel(i)
        else:
            in_threads(len(out), panel)
        return out

    def matrix(self) -> Tensor:
        """Return the matrix divided by √to, transposed: ``[size, to]``."""
        return torch.from_numpy(self.panels(self.to)[0])


class Shifted(NamedTuple):
    """A side that is kept whole: a sign for each entry, and all moved on, as a matrix.

    Args:
        key: of the signs.
        to: rows, no fewer than columns.
        size: columns.
        shift: places that they are moved on by.
    """

    key: int
    to: int
    size: int
    shift: int

    def panels(self, lanes: int) -> np.ndarray:
        """Return the matrix as :meth:`Signs.panels` does."""
        words, entries = kernels().sign_words(self.key, self.size), np.arange(self.size)
        minus = (words[entries // 32] >> (entries % 32).astype(np.uint32)) & 1
        out = np.zeros((-(-self.to // lanes), self.size, lanes), np.float32)
        place = (entries + self.shift) % self.to
        out[place // lanes, entries, place % lanes] = 1 - 2.0 * minus
        return out


Matrix = Signs | Shifted


class Placed(NamedTuple):
    """Sides of a matrix, outputs and inputs, each with a sign and a place for each entry."""

    keys: tuple[tuple[int, int], ...]  # of signs, and of places
    sizes: tuple[int, int]
    shares: tuple[int, int]


class _Work(NamedTuple):
    """A layer call as the loops take it."""

    loop: Callable[..., int]
    arrays: Callable[[slice], tuple[np.ndarray, np.ndarray]]  # factors of some examples
    settings: tuple[Any, Any]  # of the layer
    matrices: tuple[np.ndarray, np.ndarray]
    ends: Sequence[int]  # of the parts that an example can be cut into
    bytes: int  # of one example's factors


def add_projected(
    factors: Outer | Correlation, left: Matrix, right: Matrix, rows: Tensor, budget: int
) -> None:
    """Add ``A G Bᵀ`` of one layer call's gradients, which are not formed.

    Args:
        factors: outer products, or correlations that :meth:`Planes.serves`.
        left: A.
        right: B.
        rows: float32 ``[batch, k₁ · k₂]``, changed in place.
        budget: bytes that copies of factors may take at once.
    """
    work, batch = _work(factors, left, right), len(rows)
    positions = factors.output_gradient[0].numel() // left.size
    multiplications = batch * positions * (left.to * left.size + right.to * right.size)
    threads = torch.get_num_threads() if multiplications > SERIAL else 1
    # Threads take some examples each, or share one in parts that are added up in order.
    ends = work.ends if batch < threads else work.ends[-1:]
    parts = list(itertools.pairwise([0, *ends]))
    totals = np.zeros((len(parts), batch, left.to * right.to), np.float32)
    group = max(threads, budget // work.bytes // threads * threads)
    for start in range(0, batch, group):
        # Here, since what asks torch for anything would have the threads wait for each other.
        d, a = work.arrays(slice(start, start + group))
        step = -(-len(d) // threads)

        def some(
            i: int, start: int = start, d: np.ndarray = d, a: np.ndarray = a, step: int = step
        ) -> None:
            first, p = i // len(parts) * step, i % len(parts)
            own = slice(first, first + step)
            into = totals[p, start : start + len(d)][own]
            how = *work.settings, parts[p], *work.matrices, (left.to, right.to)
            with_scratch(work.loop, d[own], a[own], *how, into)

        in_threads(-(-len(d) // step) * len(parts), some)
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


def _work(factors: Outer | Correlation, left: Matrix, right: Matrix) -> _Work:
    if isinstance(factors, Outer):
        return _tokens(factors, left, right)
    layer = Planes(factors)
    return (_transformed if _transforms(layer, right.to) else _patches)(layer, left, right)


def _tokens(factors: Outer, left: Matrix, right: Matrix) -> _Work:
    """Return the work on outer products."""
    loops, both = kernels(), (factors.output_gradient, factors.input)
    matrices = left.panels(loops.COLUMNS), right.panels(loops.COLUMNS)
    positions = factors.input.shape[1]
    turned = [x.stride(1) == 1 and x.stride(2) == positions > 1 for x in both]
    walks = [loops.Walk(1, positions, 0, 1, _FIRST[:each]) for each in turned]

    def arrays(examples: slice) -> tuple[np.ndarray, np.ndarray]:
        d, a = (
            _numbers(x[examples].transpose(1, 2) if each else x[examples])
            for x, each in zip(both, turned, strict=True)
        )
        return d, a

    size = 4 * sum(x[0].numel() for x in both)
    return _Work(loops.project, arrays, (walks[0], walks[1]), matrices, _chunks(positions), size)


def _patches(layer: Planes, left: Matrix, right: Matrix) -> _Work:
    """Return the work on a convolution's inputs, patch by patch."""
    loops, factors = kernels(), layer.factors
    layer = Planes(factors, transform=False)
    matrices = left.panels(loops.COLUMNS), right.panels(loops.COLUMNS)

    def arrays(examples: slice) -> tuple[np.ndarray, np.ndarray]:
        d, a = factors.output_gradient[examples].flatten(2), factors.input[examples]
        a = a if a.ndim == 4 else a[:, :, None]
        a = F.pad(a, layer.borders) if any(layer.borders) else a
        return _numbers(d), _numbers(a.flatten(2))

    walks, ends = (layer.own, layer.walk), _chunks(prod(layer.positions))
    return _Work(loops.project, arrays, walks, matrices, ends, layer.bytes)


def _transformed(layer: Planes, left: Matrix, right: Matrix) -> _Work:
    """Return the work on a 3 × 3 convolution with many positions, which is formed in part."""
    loops, factors = kernels(), layer.factors
    matrices = left.panels(loops.COLUMNS), right.panels(loops.ROWS)

    def arrays(examples: slice) -> tuple[np.ndarray, np.ndarray]:
        d, a = factors.output_gradient[examples].flatten(2), factors.input[examples]
        return _numbers(d), _numbers(a)

    settings, ends = (layer.padding, layer.own), range(1, len(matrices[0]) + 1)
    return _Work(loops.project_transformed, arrays, settings, matrices, ends, layer.bytes)


def _chunks(positions: int) -> Sequence[int]:
    """Return where parts of an example's positions end."""
    return [*range(kernels().CHUNK, positions, kernels().CHUNK), positions]


def _transforms(layer: Planes, share: int) -> bool:
    """Return whether forming k₁ kernels and projecting them takes less than projecting patches."""
    loops, size, tiles = kernels(), prod(layer.positions), prod(layer.tiles)
    whole = layer.positions == layer.d_size and layer.transforms
    return whole and loops.PRODUCTS * tiles + 9 * share + loops.TRANSFORM_COST < 9 * size


def _numbers(x: Tensor) -> np.ndarray:
    return wide(x).detach().contiguous().numpy()


_FIRST = np.zeros(1, np.int64)
