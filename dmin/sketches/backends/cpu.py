"""Fold per-example gradients on a CPU while they are formed, in all threads that torch may use.

Each example's rows of a gradient are cut into parts, which are folded apart and then added up in
order: the result is the same to the bit for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmin.gradients.factors import Correlation, Dense, GradientFactors, Outer, Sum, wide
from dmin.sketches.backends.packing import Layout, Planes, Tokens, kernels
from dmin.sketches.backends.threads import in_threads, with_scratch

if TYPE_CHECKING:
    from dmin.sketches.backends.cpu_kernels import Fold

PARTS = 4  # of an example's rows, where there are fewer examples, …
PART = 1 << 15  # … if a part has so many entries


_NOTHING = np.empty(0, np.int32), np.empty(0, np.float32)


def applies(values: Tensor) -> bool:
    """Return whether the kernels serve rows of this device and dtype."""
    return values.device.type == "cpu" and values.dtype == torch.float32


def as_matrices(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (taps, out, in): a parameter as one matrix for each tap of its kernel.

    A vector is a single row. The order of entries is that of (tap, out, in).
    """
    if len(shape) < 2:
        return 1, 1, prod(shape)
    return prod(shape[2:]), shape[0], shape[1]


def taps_first(gradient: Tensor, shape: Sequence[int]) -> Tensor:
    """Return gradients ``[batch, *shape]`` as ``[batch, taps, out, in]``, a view if possible."""
    taps, out, width = as_matrices(shape)
    return gradient.reshape(-1, out, width, taps).permute(0, 3, 1, 2)


def taps_last(entries: Tensor, shape: Sequence[int]) -> Tensor:
    """Return what belongs to the entries in the order (tap, out, in) as a flattened parameter."""
    taps, out, width = as_matrices(shape)
    return entries.reshape(taps, out * width).T.reshape(-1)


def fold_factors(
    factors: GradientFactors,
    shape: Sequence[int],
    fold: Fold,
    rows: Tensor,
    norms: Tensor | None,
    budget: int,
) -> None:
    """Add the folded gradients of one parameter to the rows of a batch.

    Args:
        factors: the gradients.
        shape: of the parameter.
        fold: its map.
        rows: float32 ``[batch, k]``, changed in place.
        norms: float32 ``[batch]``, to which squared norms are added; None if they are not wanted.
        budget: bytes that formed gradients or packed factors may take at once.
    """
    measure = norms is not None
    # The loops are compiled for rows that lie side by side: those of a single group.
    sums = rows if rows.is_contiguous() else torch.zeros(rows.shape)
    work = _Work(as_matrices(shape), fold, sums.numpy(), np.zeros(len(rows), np.float32), measure)
    layouts = _layouts(factors, measure)
    if layouts is None:
        _fold_dense(factors, shape, work, budget)
    elif factors.batch < PARTS and prod(shape) >= PARTS * PART:
        _fold_in_parts(layouts, work)
    else:
        for layout in layouts:
            _fold_examples(layout, work, budget)
    if sums is not rows:
        rows += sums
    if norms is not None:
        norms += torch.from_numpy(work.squares)


class _Work(NamedTuple):
    """What is folded, and where to."""

    shape: tuple[int, int, int]  # taps, out, in
    fold: Fold
    rows: np.ndarray  # [batch, k], to which gradients are added
    squares: np.ndarray  # [batch], to which squared norms are added
    measure: bool  # whether they are


def _fold_examples(layout: Layout, work: _Work, budget: int) -> None:
    """Fold a layer call; each thread takes some of the examples at once."""
    _, out, width = work.shape
    threads = torch.get_num_threads()
    group = threads * max(1, budget // (threads * layout.bytes))  # that are copied at once
    for start in range(0, len(work.rows), group):
        examples = slice(start, start + group)
        d, a = layout.arrays(examples)
        rows, squares = work.rows[examples], work.squares[examples]
        step = -(-len(d) // threads)

        def some(
            i: int,
            step: int = step,
            d: np.ndarray = d,
            a: np.ndarray = a,
            rows: np.ndarray = rows,
            squares: np.ndarray = squares,
        ) -> None:
            own = slice(i * step, (i + 1) * step)
            into = out, width, work.fold, rows[own], squares[own], work.measure
            with_scratch(layout.fold, d[own], a[own], *layout.settings, *into)

        in_threads(-(-len(d) // step), some)


def _fold_in_parts(layouts: Sequence[Layout], work: _Work) -> None:
    """Fold layer calls of so few examples that threads share one; parts are added up in order."""
    _, out, width = work.shape
    batch = len(work.rows)
    for layout in layouts:
        total = np.zeros((batch, PARTS, work.fold.length), np.float32)
        squares = np.zeros((batch, PARTS), np.float32)
        packed: list[Any] = [None] * batch

        def pack(i: int, layout: Layout = layout, packed: list[Any] = packed) -> None:
            packed[i] = layout.pack(i)

        def part(
            i: int,
            layout: Layout = layout,
            packed: list[Any] = packed,
            total: np.ndarray = total,
            squares: np.ndarray = squares,
        ) -> None:
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
    gradients: Sequence[Tensor],
    keys: Sequence[tuple[int, int]],
    block: int,
    rows: Tensor,
    norms: Tensor | None,
) -> None:
    """Add the folded gradients of vectors to the rows of a batch, block-cyclic.

    Args:
        gradients: of each vector, ``[batch, n]``.
        keys: of each one's signs and offsets.
        block: b.
        rows: as for :func:`fold_factors`.
        norms: likewise.
    """
    measure = norms is not None
    sums = rows if rows.is_contiguous() else torch.zeros(rows.shape)
    squares = np.zeros(len(rows), np.float32)
    words = np.array(keys, np.uint32)
    together = side_by_side(gradients), starts_of(gradients), words, block
    kernels().fold_vectors(*together, sums.numpy(), squares, measure)
    if sums is not rows:
        rows += sums
    if norms is not None:
        norms += torch.from_numpy(squares)


def side_by_side(gradients: Sequence[Tensor]) -> np.ndarray:
    """Return gradients ``[batch, n]`` in one array ``[batch, P]``."""
    return torch.cat([wide(gradient.detach()) for gradient in gradients], 1).numpy()


def starts_of(gradients: Sequence[Tensor]) -> np.ndarray:
    """Return where each of these begins, and the end of the last."""
    return np.cumsum([0, *(gradient.shape[1] for gradient in gradients)])


def block_cyclic(sign: int, words: int, offset: int, blocks: int, dim: int, block: int) -> Fold:
    """Return a block-cyclic map for the kernels.

    Args:
        sign: key of the signs.
        words: number of words of 32 signs.
        offset: key of the offsets.
        blocks: number of blocks.
        dim: k.
        block: b.
    """
    loops = kernels()
    hashed, places = loops.hashed_map(sign, words, offset, blocks, dim)
    return loops.Fold(hashed, places, block, dim + block, *_NOTHING, *_NOTHING)


def tensor_sketch(row: tuple[Tensor, Tensor], column: tuple[Tensor, Tensor], dim: int) -> Fold:
    """Return a TensorSketch for the kernels, to fold gradients that are formed.

    Args:
        row: bucket and sign of each output.
        column: bucket and sign of each input, for each tap.
        dim: k.
    """
    sides = [x.numpy() for bucket, sign in (row, column) for x in (bucket.int(), sign.float())]
    none = np.empty(0, np.uint32), np.empty(0, np.int32)
    return kernels().Fold(*none, 0, 2 * dim, *sides)


def scatter(gradient: Tensor, bucket: Tensor, sign: Tensor, values: Tensor) -> None:
    """Add signed gradients at buckets.

    Args:
        gradient: float32 ``[batch, P]``.
        bucket: integers ``[P]``.
        sign: ``[P]``, ±1.
        values: float32 ``[batch, k]``, changed in place.
    """
    loops, map_ = kernels(), (bucket.numpy(), sign.numpy())

    def work(i: int) -> None:
        loops.scatter(gradient[i].numpy(), *map_, values[i].numpy())

    in_threads(len(gradient), work)


def _fold_dense(factors: GradientFactors, shape: Sequence[int], work: _Work, budget: int) -> None:
    """Have torch form the gradients, and fold them."""
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
        del gradient, formed, part, some  # before the next slice is formed: one at a time


def _layouts(factors: GradientFactors, measure: bool) -> list[Layout] | None:
    """Return how factors are packed for the kernels, or None if they must be formed by torch."""
    parts = factors.parts if isinstance(factors, Sum) else [factors]
    outer = [part for part in parts if isinstance(part, Outer)]
    if len(outer) == len(parts):
        if measure and len(parts) > 1:  # a norm is that of the sum: positions of all calls at once
            d = torch.cat([part.output_gradient for part in outer], 1)
            outer = [Outer(d, torch.cat([part.input for part in outer], 1))]
        return [Tokens(part) for part in outer]
    if measure and len(parts) > 1:
        return None
    planes = [part for part in parts if isinstance(part, Correlation) and Planes.serves(part)]
    return [Planes(part) for part in planes] if len(planes) == len(parts) else None
