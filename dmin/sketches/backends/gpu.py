"""Sketch on a GPU: gradients formed on tensor cores and folded, factors count-sketched, by Triton.

Which tensors the kernels of :mod:`dmin.sketches.backends.gpu_kernels` are called with, and in what
pieces. Nothing here waits for the device. All sums are in an order that the map fixes, so the same
input gives the same bits, in any batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dmin.gradients.factors import Correlation, GradientFactors, Outer, Sum
from dmin.runtime.errors import DminError
from dmin.sketches.backends.cpu import as_matrices

Kernels = Literal["auto", "triton", "torch"]

# A program adds up so many buckets, for so many examples: places and signs are found once for all.
TILE, EXAMPLES = 512, 4
BLOCKS_OF_A_SPLIT, ROWS_OF_A_SPLIT, MOST_SPLITS = 512, 64, 64
WARPS = 4
# What stands between two kernels of a transform: within the second cache of an A100 or later.
CACHED = 24 << 20


def check(kernels: str) -> None:
    """Refuse a setting of kernels that does not exist, or that cannot be had.

    Raises:
        DminError: names what is allowed, or what is missing.
    """
    if kernels not in get_args(Kernels):
        raise DminError(
            f"kernels={kernels!r}: allowed are auto (compiled loops on a CPU, Triton on a GPU "
            f"where it is installed), triton, and torch (plain torch operations everywhere)."
        )
    if kernels == "triton" and not installed():
        raise DminError(
            "kernels=triton, but Triton is not installed. It comes with torch for CUDA; else "
            "pip install triton, or set kernels=auto."
        )


def serves(values: Tensor, kernels: str) -> bool:
    """Return whether rows of this device and dtype are made by the Triton kernels.

    Rows in double precision, the oracle's, are made by torch whatever is asked for.

    Raises:
        DminError: Triton is asked for where it cannot be.
    """
    if kernels == "triton" and not (values.is_cuda or interpreted()):
        raise DminError(
            f"kernels=triton, but the rows are on {values.device}: Triton's kernels run on a GPU. "
            f"Set kernels=auto."
        )
    asked = kernels == "triton" or (kernels == "auto" and values.is_cuda and installed())
    return asked and values.dtype == torch.float32


@cache
def installed() -> bool:
    """Return whether Triton is there."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether Triton interprets its kernels, on a CPU: for tests."""
    return installed() and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def kernels() -> Any:
    """Return the kernels, imported when first needed."""
    from dmin.sketches.backends import gpu_kernels

    return gpu_kernels


class Blocks(NamedTuple):
    """The blocks of a parameter by ascending offset, and those that reach each tile of buckets."""

    order: Tensor  # int32 [blocks]
    offset: Tensor  # int32 [blocks]
    first: Tensor  # int32 [tiles]
    reaching: Tensor  # int32 [tiles]


def sorted_blocks(offsets: Tensor, dim: int, block: int) -> Blocks:
    """Sort the blocks of a block-cyclic map: 8 bytes a block.

    Args:
        offsets: integers ``[blocks]`` in [0, k).
        dim: k.
        block: b.
    """
    offset, order = offsets.sort(stable=True)
    starts = torch.arange(0, dim, tile_of(dim), device=offsets.device)
    if tile_of(dim) + block > dim:
        first, count = torch.zeros_like(starts), torch.full_like(starts, len(offsets))
    else:
        lowest = (starts - block + 1) % dim
        first = torch.searchsorted(offset, lowest)
        count = torch.searchsorted(offset, starts + tile_of(dim)) - first
        count += torch.where(lowest > starts, len(offsets), 0)  # from behind the last bucket, too
    return Blocks(order.int(), offset.int(), first.int(), count.int())


class Columns(NamedTuple):
    """Which entries of a side lie in each bucket; entries of one bucket are in several layers."""

    column: Tensor  # int32 [layers, dim], −1 for none
    sign: Tensor  # float32 [layers, dim], 0 for none


class Sides(NamedTuple):
    """The map of a TensorSketch, as the kernels want it."""

    row: Columns
    column: Columns
    row_bucket: Tensor  # int32 [outputs]
    row_sign: Tensor  # float32 [outputs]
    order: Tensor  # int64 [columns]: by ascending bucket
    order_sign: Tensor  # float32 [columns]: theirs, in that order
    ordered: Tensor  # int32 [layers, dim]: as `column`, of columns in that order


def sides(row: tuple[Tensor, Tensor], column: tuple[Tensor, Tensor], dim: int, to: Any) -> Sides:
    """Return a TensorSketch for the kernels, worked out on the CPU and sent once.

    Args:
        row: bucket and sign of each output.
        column: bucket and sign of each (tap, input).
        dim: k.
        to: device.
    """
    bucket, sign = column
    order = bucket.argsort(stable=True)
    ordered = columns((bucket[order], sign[order]), dim).column
    places = columns(row, dim), columns(column, dim)
    single = row[0].int(), row[1].float(), order, sign[order].float(), ordered
    first, second = (Columns(*(x.to(to) for x in side)) for side in places)
    return Sides(first, second, *(x.to(to) for x in single))


def columns(side: tuple[Tensor, Tensor], dim: int) -> Columns:
    """Return the entries of each bucket, from the bucket and sign of each entry; on the CPU."""
    bucket, sign = side
    ascending, order = bucket.sort(stable=True)
    layer = torch.arange(len(bucket)) - torch.searchsorted(ascending, ascending)
    column = torch.full((int(layer.max()) + 1, dim), -1, dtype=torch.int32)
    column[layer, ascending] = order.int()
    return Columns(column, torch.where(column < 0, 0.0, sign.float()[column.long()]))


def tile_of(dim: int) -> int:
    """Return how many buckets a program has."""
    return min(TILE, 1 << (dim - 1).bit_length())


def fold_blocks(
    factors: GradientFactors,
    shape: Sequence[int],
    blocks: Blocks,
    block: int,
    sign: int,
    rows: Tensor,
    norms: Tensor | None,
    budget: int,
) -> None:
    """Add the block-cyclic folds of one parameter's gradients to the rows of a batch.

    Args:
        factors: the gradients.
        shape: of the parameter.
        blocks: its blocks, sorted.
        block: b.
        sign: key of the signs.
        rows: float32 ``[batch, k]``, changed in place.
        norms: float32 ``[batch]``, to which squared norms are added; None if they are not wanted.
        budget: bytes that formed gradients may take at once.
    """
    taps, out, width = as_matrices(shape)
    dim, words_of_row, of_row = rows.shape[1], -(-width // 32), -(-width // block)
    words = hashed_words(sign, taps * out * words_of_row, rows.device)
    tile, count = tile_of(dim), len(blocks.order)
    splits = min(MOST_SPLITS, max(1, count // BLOCKS_OF_A_SPLIT))
    tiles = len(blocks.first)
    for examples, part in _slices(factors, 4 * prod(shape), budget):
        gradient, strides = formed(part, shape)
        batch = len(gradient)
        partial = rows.new_empty(batch, splits, dim)
        squares = rows.new_empty(batch, splits, tiles if norms is not None else 0)
        kernels().fold_blocks[tiles, splits, -(-batch // EXAMPLES)](
            gradient,
            *blocks,
            words,
            partial,
            squares,
            batch,
            dim,
            out,
            width,
            count,
            of_row,
            words_of_row,
            gradient.stride(0),
            *strides,
            BLOCK=block,
            EXAMPLES=EXAMPLES,
            TILE=tile,
            MEASURE=norms is not None,
            num_warps=WARPS,
        )
        rows[examples] += partial.sum(1)
        if norms is not None:
            norms[examples] += squares.sum((1, 2))
        del gradient, part  # before the next slice is formed: there is one at a time


def fold_tensor_sketch(
    factors: GradientFactors, shape: Sequence[int], sides: Sides, rows: Tensor, budget: int
) -> None:
    """Add the TensorSketches of gradients that are formed, with their columns in bucket order.

    Args:
        factors: sums of outer products, or correlations that :func:`as_product` takes.
        shape: of the parameter.
        sides: its map.
        rows: float32 ``[batch, k]``, changed in place.
        budget: bytes that formed gradients may take at once.
    """
    dim, out = rows.shape[1], shape[0]
    tile, layers = tile_of(dim), len(sides.ordered)
    splits = min(MOST_SPLITS, max(1, out // ROWS_OF_A_SPLIT))
    for examples, part in _slices(factors, 4 * prod(shape), budget):
        gradient = _in_order(part, shape, sides)
        batch = len(gradient)
        partial = rows.new_empty(batch, splits, dim)
        kernels().fold_rows[-(-dim // tile), splits, -(-batch // EXAMPLES)](
            gradient,
            sides.row_bucket,
            sides.row_sign,
            sides.ordered,
            partial,
            batch,
            dim,
            out,
            layers,
            gradient.stride(0),
            gradient.stride(1),
            EXAMPLES=EXAMPLES,
            TILE=tile,
            num_warps=WARPS,
        )
        rows[examples] += partial.sum(1)
        del gradient, part


def add_spectra(factors: Outer, sides: Sides, dim: int, spectrum: Tensor) -> None:
    """Add ``Σ_p F(C₁ d_p) ∘ F(C₂ a_p)`` over positions, as many at a time as the cache holds.

    Args:
        factors: the outer products.
        sides: the map.
        dim: k.
        spectrum: complex64 ``[batch, k // 2 + 1]``, changed in place.
    """
    positions, frequencies = factors.input.shape[1], dim // 2 + 1
    step = max(1, min(positions, CACHED // (16 * dim)))  # two count sketches, two spectra
    some = max(1, CACHED // (16 * dim * step))
    tile = 128
    for first in range(0, factors.batch, some):
        examples = slice(first, first + some)
        part, sums = factors[examples], spectrum[examples]
        # Sums go with the positions of an example alone, so they do not depend on the batch.
        for start in range(0, positions, step):
            d = part.output_gradient[:, start : start + step]
            a = part.input[:, start : start + step]
            left = torch.fft.rfft(counted(d, sides.row, dim))
            right = torch.fft.rfft(counted(a, sides.column, dim))
            kernels().add_products[-(-frequencies // tile), part.batch](
                torch.view_as_real(left),
                torch.view_as_real(right),
                torch.view_as_real(sums),
                d.shape[1],
                frequencies,
                sums.stride(0),
                STEP=8,
                TILE=tile,
                num_warps=WARPS,
            )


def counted(x: Tensor, side: Columns, dim: int) -> Tensor:
    """Return the count sketches of rows ``[batch, positions, n]``, float32 with k for n."""
    batch, positions, _ = x.shape
    found = torch.empty(batch, positions, dim, device=x.device)
    rows, tile = batch * positions, tile_of(dim)
    kernels().count_sketch[-(-rows // EXAMPLES), -(-dim // tile)](
        x,
        *side,
        found,
        rows,
        dim,
        len(side.column),
        positions,
        *x.stride(),
        ROWS=EXAMPLES,
        TILE=tile,
        num_warps=WARPS,
    )
    return found


def hashed_words(key: int, count: int, device: torch.device) -> Tensor:
    """Return the words of :func:`dmin.sketches.hashing.hash_words`, as int32 bits."""
    words = torch.empty(count, dtype=torch.int32, device=device)
    signed = key - (1 << 32) if key >> 31 else key  # one type whatever the key is: compiled once
    kernels().hash_words[-(-count // 1024),](signed, words, count, TILE=1024, num_warps=WARPS)
    return words


def as_product(factors: GradientFactors) -> Outer | None:
    """Return gradients as outer products of outputs and (tap, input), or None if they are not."""
    if isinstance(factors, Sum):
        parts = [as_product(part) for part in factors.parts]
        if any(part is None for part in parts):
            return None
        d = torch.cat([part.output_gradient for part in parts if part], 1)
        return Outer(d, torch.cat([part.input for part in parts if part], 1))
    if isinstance(factors, Correlation):
        return factors.as_outer()
    return factors if isinstance(factors, Outer) else None


def formed(factors: GradientFactors, shape: Sequence[int]) -> tuple[Tensor, tuple[int, int, int]]:
    """Return gradients in float32, and their strides along taps, outputs and inputs."""
    taps, _, width = as_matrices(shape)
    product = as_product(factors)
    if product is not None:
        return product.dense().float(), (width, taps * width, 1)
    dense = factors.dense().float().reshape(factors.batch, -1)
    return dense, (1, taps * width, taps)


def _in_order(factors: GradientFactors, shape: Sequence[int], sides: Sides) -> Tensor:
    """Return signed gradients ``[batch, out, columns]`` with columns by ascending bucket."""
    product = as_product(factors)
    if product is not None:  # signs cost no precision, and factors are smaller than gradients
        a = product.input.index_select(-1, sides.order) * sides.order_sign.to(product.input.dtype)
        return Outer(product.output_gradient, a).dense().float()
    taps, out, width = as_matrices(shape)
    natural = factors.dense().float().reshape(-1, out, width, taps).transpose(2, 3).flatten(2)
    return natural.index_select(-1, sides.order) * sides.order_sign


def _slices(factors: GradientFactors, bytes_each: int, budget: int) -> Any:
    step = max(1, budget // max(1, bytes_each))
    for start in range(0, factors.batch, step):
        yield slice(start, start + step), factors[start : start + step]
