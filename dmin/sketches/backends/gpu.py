"""Sketch on a GPU: gradients formed on tensor cores and folded, factors count-sketched, by Triton.

Prepares the tensors for the kernels of :mod:`dmin.sketches.backends.gpu_kernels` and splits them
into chunks. Nothing here waits for the device. The map fixes the order of all sums, so the same
input gives the same bits, in any batch.
"""

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from dmin.gradients.factors import Correlation, GradientFactors, Outer, Sum
from dmin.sketches.backends.base import GroupRows
from dmin.sketches.backends.gpu_tables import Columns, Sides, blocks_of, sides_of, tile_of
from dmin.sketches.backends.torch import TorchBackend
from dmin.sketches.maps import BlockCyclicMap, Map, TensorSketchMap, as_matrices

EXAMPLES = 4  # examples per program, which computes buckets and signs once for all of them
BLOCKS_OF_A_SPLIT, ROWS_OF_A_SPLIT, MOST_SPLITS = 512, 64, 64
WARPS = 4
# Bytes of intermediate results between two kernels: they fit into the L2 cache of an A100 or later.
CACHED = 24 << 20


class GpuBackend(TorchBackend):
    """Triton's kernels for rows in single precision; torch for maps of other kinds.

    Args:
        budget: most bytes of formed gradients in memory at once.
    """

    def fold(self, factors: GradientFactors, map_: Map, rows: GroupRows) -> None:
        """Form the gradients, and fold them in programs that each sum one tile of buckets."""
        if isinstance(map_, BlockCyclicMap):
            fold_blocks(factors, map_, rows, self.budget)
        elif isinstance(map_, TensorSketchMap):
            fold_tensor_sketch(factors, map_, rows.values, self.budget)
        else:
            super().fold(factors, map_, rows)

    def add_spectra(
        self, factors: GradientFactors, map_: TensorSketchMap, spectrum: Tensor
    ) -> None:
        """Count-sketch, transform and multiply as many positions at a time as fit into cache."""
        outer = as_product(factors)
        assert outer is not None
        add_spectra(outer, map_, spectrum)


@cache
def kernels() -> Any:
    """Return the kernels, imported on first use."""
    from dmin.sketches.backends import gpu_kernels

    return gpu_kernels


def fold_blocks(
    factors: GradientFactors, map_: BlockCyclicMap, rows: GroupRows, budget: int
) -> None:
    """Add the block-cyclic folds of one parameter's gradients to the rows of a batch.

    Args:
        factors: the gradients.
        map_: the map of the parameter.
        rows: rows with float32 values.
        budget: most bytes of formed gradients in memory at once.
    """
    shape, values, norms = map_.shape, rows.values, rows.squared_norm
    blocks = blocks_of(map_, values.device)
    _, out, width = as_matrices(shape)
    dim, words_of_row, of_row = map_.dim, -(-width // 32), -(-width // map_.block)
    words = hashed_words(map_.sign, map_.words, values.device)
    tile, count = tile_of(dim), len(blocks.order)
    splits = min(MOST_SPLITS, max(1, count // BLOCKS_OF_A_SPLIT))
    tiles = len(blocks.first)
    for examples, part in _slices(factors, 4 * prod(shape), budget):
        gradient, strides = formed(part, shape)
        batch = len(gradient)
        partial = values.new_empty(batch, splits, dim)
        squares = values.new_empty(batch, splits, tiles if norms is not None else 0)
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
            BLOCK=map_.block,
            EXAMPLES=EXAMPLES,
            TILE=tile,
            MEASURE=norms is not None,
            num_warps=WARPS,
        )
        values[examples] += partial.sum(1)
        if norms is not None:
            norms[examples] += squares.sum((1, 2))
        del gradient, part  # free this slice before the next one is formed


def fold_tensor_sketch(
    factors: GradientFactors, map_: TensorSketchMap, rows: Tensor, budget: int
) -> None:
    """Add the TensorSketches of gradients that are formed with columns sorted by bucket.

    Args:
        factors: the gradients.
        map_: the map of the parameter.
        rows: float32 ``[batch, k]``, changed in place.
        budget: most bytes of formed gradients in memory at once.
    """
    shape, sides = map_.shape, sides_of(map_, rows.device)
    dim, out = map_.dim, shape[0]
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


def add_spectra(factors: Outer, map_: TensorSketchMap, spectrum: Tensor) -> None:
    """Add ``Σ_p F(C₁ d_p) ∘ F(C₂ a_p)`` over positions, as many at a time as fit into the cache.

    Args:
        factors: the outer products.
        map_: the map of the parameter.
        spectrum: complex64 ``[batch, k // 2 + 1]``, changed in place.
    """
    sides, dim = sides_of(map_, spectrum.device), map_.dim
    positions, frequencies = factors.input.shape[1], dim // 2 + 1
    step = max(1, min(positions, CACHED // (16 * dim)))  # two count sketches, two spectra
    some = max(1, CACHED // (16 * dim * step))
    tile = 128
    for first in range(0, factors.batch, some):
        examples = slice(first, first + some)
        part, sums = factors[examples], spectrum[examples]
        # Chunks depend only on an example's number of positions, so the batch changes no sum.
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
    """Return count sketches of x ``[batch, positions, n]``, float32 ``[batch, positions, k]``."""
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
    signed = key - (1 << 32) if key >> 31 else key  # one type for all keys: compiled once
    kernels().hash_words[-(-count // 1024),](signed, words, count, TILE=1024, num_warps=WARPS)
    return words


def as_product(factors: GradientFactors) -> Outer | None:
    """Return gradients as outer products of outputs and (tap, input), or None if impossible."""
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
    """Return gradients in float32, with their strides along taps, outputs and inputs."""
    taps, _, width = as_matrices(shape)
    product = as_product(factors)
    if product is not None:
        return product.dense().float(), (width, taps * width, 1)
    dense = factors.dense().float().reshape(factors.batch, -1)
    return dense, (1, taps * width, taps)


def _in_order(factors: GradientFactors, shape: Sequence[int], sides: Sides) -> Tensor:
    """Return gradients ``[batch, out, columns]``, signed and with columns by ascending bucket."""
    product = as_product(factors)
    if product is not None:  # signs are exact, and factors are smaller than gradients
        a = product.input.index_select(-1, sides.order) * sides.order_sign.to(product.input.dtype)
        return Outer(product.output_gradient, a).dense().float()
    taps, out, width = as_matrices(shape)
    natural = factors.dense().float().reshape(-1, out, width, taps).transpose(2, 3).flatten(2)
    return natural.index_select(-1, sides.order) * sides.order_sign


def _slices(factors: GradientFactors, bytes_each: int, budget: int) -> Any:
    step = max(1, budget // max(1, bytes_each))
    for start in range(0, factors.batch, step):
        yield slice(start, start + step), factors[start : start + step]
