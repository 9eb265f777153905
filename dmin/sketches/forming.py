"""Fold per-example gradients on a CPU while they are formed, in all threads that torch may use.

Each example's rows of a gradient are cut into parts, which are folded apart and then added up in
order: the result is the same to the bit for any number of threads.
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dmin.layer_gradients import Correlation, Dense, GradientFactors, Outer, Sum, wide

if TYPE_CHECKING:
    from dmin.sketches.cpu_kernels import Fold, Walk

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
    layouts = _layouts(factors, measure)
    # So few examples that threads share them: the parts are added up in order at the end.
    shared = factors.batch < PARTS and prod(shape) >= PARTS * PART
    parts = PARTS if layouts is not None and shared else 1
    total = np.zeros((factors.batch, parts, fold.length), np.float32)
    squares = np.zeros((factors.batch, parts), np.float32)
    if layouts is None:
        _fold_dense(factors, shape, fold, total[:, 0], squares[:, 0], measure, budget)
    else:
        _, out, width = as_matrices(shape)
        for layout in layouts:
            group = max(torch.get_num_threads(), budget // layout.bytes)
            for start in range(0, factors.batch, group):
                some = slice(start, start + group)
                _fold_packed(layout, start, (out, width), fold, total[some], squares[some], measure)
    kernels().wrap(total, rows.numpy())
    if norms is not None:
        norms += torch.from_numpy(squares.sum(1))


def _fold_packed(
    layout: _Layout,
    start: int,
    shape: tuple[int, int],
    fold: Fold,
    total: np.ndarray,
    squares: np.ndarray,
    measure: bool,
) -> None:
    """Fold some examples, from the start-th on, into totals and squares ``[examples, parts]``."""
    parts = total.shape[1]
    packed: list[Any] = [None] * len(total)

    def pack(i: int) -> None:
        packed[i] = layout.pack(start + i)

    def work(i: int) -> None:
        example, part = i // parts, i % parts
        panels = len(packed[example][0])
        panels_of_part = panels * part // parts, panels * (part + 1) // parts
        squares[example, part] += layout.kernel(
            *packed[example], *shape, fold, *panels_of_part, total[example, part], measure
        )

    if parts == 1:  # one call for several examples
        step = max(1, len(total) // (2 * torch.get_num_threads()))

        def several(i: int) -> None:
            some = slice(i * step, (i + 1) * step)
            layout.fold(
                slice(start + i * step, start + min((i + 1) * step, len(total))),
                *shape,
                fold,
                total[some, 0],
                squares[some, 0],
                measure,
            )

        in_threads(-(-len(total) // step), several)
    else:
        in_threads(len(total), pack)
        in_threads(len(total) * parts, work)


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


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Call ``work(0) … work(count − 1)``, in as many threads as torch may use."""
    threads = min(torch.get_num_threads(), count)
    numbers = itertools.count()

    def drain() -> None:
        while (i := next(numbers)) < count:
            work(i)

    helpers = [_pool(os.getpid(), threads).submit(drain) for _ in range(threads - 1)]
    try:
        drain()
    finally:
        for helper in helpers:
            helper.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the threads that stand ready; a forked process has its own."""
    return ThreadPoolExecutor(threads, "dmin-fold")


@cache
def kernels() -> Any:
    """Return the compiled loops, imported when first needed: that takes a second."""
    from dmin.sketches import cpu_kernels

    return cpu_kernels


def _fold_dense(
    factors: GradientFactors,
    shape: Sequence[int],
    fold: Fold,
    total: np.ndarray,
    squares: np.ndarray,
    measure: bool,
    budget: int,
) -> None:
    """Have torch form the gradients, and fold them into totals and squares of the examples."""
    loops, size = kernels(), prod(shape)
    step = max(1, budget // max(4, 4 * size))
    for start in range(0, factors.batch, step):
        part = factors[start : start + step]
        formed = part.gradient if isinstance(part, Dense) else part.dense()
        gradient = taps_first(formed.detach().float(), shape).numpy()

        def work(i: int, n: int = 1, start: int = start, gradient: Any = gradient) -> None:
            some = slice(start + i, start + i + n)
            loops.fold_formed(gradient[i : i + n], fold, total[some], squares[some], measure)

        if size < PART:
            work(0, len(gradient))
        else:
            in_threads(len(gradient), work)
        del gradient, formed, part  # before the next slice is formed: there is one at a time


def _layouts(factors: GradientFactors, measure: bool) -> list[_Layout] | None:
    """Return how factors are packed for the kernels, or None if they must be formed by torch."""
    parts = factors.parts if isinstance(factors, Sum) else [factors]
    outer = [part for part in parts if isinstance(part, Outer)]
    if len(outer) == len(parts):
        if measure and len(parts) > 1:  # a norm is that of the sum: positions of all calls at once
            d = torch.cat([part.output_gradient for part in outer], 1)
            outer = [Outer(d, torch.cat([part.input for part in outer], 1))]
        return [_Tokens(part) for part in outer]
    if measure and len(parts) > 1:
        return None
    planes = [part for part in parts if isinstance(part, Correlation) and Planes.serves(part)]
    return [Planes(part) for part in planes] if len(planes) == len(parts) else None


class _Layout(ABC):
    """Packs one layer call's factors, example by example."""

    kernel: Any
    bytes: int

    @abstractmethod
    def pack(self, example: int) -> Sequence[Any]:
        """Return the packed factors of an example: the kernel's first arguments."""

    @abstractmethod
    def fold(self, examples: slice, *rest: Any) -> None:
        """Pack, form and fold some examples; the rest is what the kernel takes last."""

    def _panels(self, channels: int, panel: int) -> int:
        return -(-channels // panel)


class _Tokens(_Layout):
    """Outer products: channels lie side by side in memory."""

    def __init__(self, factors: Outer) -> None:
        self.factors = factors
        self._both = factors.output_gradient, factors.input
        self.kernel = kernels().form_and_fold
        self.bytes = 4 * (factors.output_gradient[0].numel() + factors.input[0].numel())

    @cached_property
    def walk(self) -> Walk:
        positions = self.factors.input.shape[1]
        return kernels().Walk(1, positions, 0, 1, np.zeros(1, np.int64))

    def pack(self, example: int) -> Sequence[Any]:
        loops, packed = kernels(), []
        for x, panel in (
            (self.factors.output_gradient, loops.ROWS),
            (self.factors.input, loops.COLUMNS),
        ):
            one = wide(x[example]).numpy()
            out = np.zeros((self._panels(one.shape[1], panel), len(one), panel), np.float32)
            loops.pack_rows(one, out)
            packed.append(out)
        return *packed, self.walk

    def fold(self, examples: slice, *rest: Any) -> None:
        d, a = (wide(x[examples]).numpy() for x in self._both)
        kernels().fold_tokens(d, a, self.walk, *rest)


class Planes(_Layout):
    """Correlations in one or two dimensions: positions lie side by side in memory."""

    @staticmethod
    def serves(factors: Correlation) -> bool:
        """Return whether a convolution is one of these."""
        layer = factors.layer
        return type(layer) in (nn.Conv1d, nn.Conv2d) and layer.groups == 1

    def __init__(self, factors: Correlation, transform: bool = True) -> None:
        loops = kernels()
        self.factors = factors
        layer = factors.layer
        self.kernel_size = _plane(layer.kernel_size)
        self.stride = _plane(layer.stride)
        self.dilation = _plane(layer.dilation)
        self.padding = _plane(factors.padding, 0)
        self.positions = _plane(factors.output_gradient.shape[2:])
        size = prod(self.positions)
        self.tiles = [-(-n // loops.TILE) for n in self.positions]
        simple = (self.kernel_size, self.stride, self.dilation) == ((3, 3), (1, 1), (1, 1))
        transformed = loops.PRODUCTS * prod(self.tiles) + loops.TRANSFORM_COST
        self.transforms = transform and simple and transformed < 9 * size
        if self.transforms:
            self.kernel = loops.form_transformed_and_fold
            height, width = (loops.TILE * n for n in self.tiles)
            self.d_size, self.a_size = (height, width), (height + 2, width + 2)
        else:
            self.kernel = loops.form_and_fold
            self.d_size = self.positions
            reach = zip(self.positions, self.stride, self.kernel_size, self.dilation, strict=True)
            height, width = ((n - 1) * s + (k - 1) * d + 1 for n, s, k, d in reach)
            self.a_size = height, width
        channels = factors.output_gradient.shape[1] + factors.input.shape[1]
        self.bytes = 4 * channels * prod(self.a_size) * (4 if self.transforms else 1)

    @property
    def borders(self) -> list[int]:
        """Zeros around the inputs, as ``F.pad`` wants them; negative where some are not needed."""
        top, left = self.padding
        height, width = _plane(self.factors.input.shape[2:])
        (down, across), (up, before) = self.a_size, (top, left)
        return [before, across - width - before, up, down - height - up]

    @cached_property
    def walk(self) -> Walk:
        """Which pixel lies under which position."""
        (lines, length), width = self.positions, self.a_size[1]
        down, across = self.dilation
        starts = [
            i * down * width + j * across
            for i in range(self.kernel_size[0])
            for j in range(self.kernel_size[1])
        ]
        step, line_step = self.stride[1], self.stride[0] * width
        return kernels().Walk(lines, length, line_step, step, np.array(starts))

    def pack(self, example: int) -> Sequence[Any]:
        """Return the packed factors of an example: the kernel's first arguments."""
        loops = kernels()
        d = _image(self.factors.output_gradient[example])
        a = _image(self.factors.input[example])
        panels_d = self._panels(len(d), loops.ROWS)
        packed_d = _with_slack(panels_d, *self.d_size, loops.ROWS)
        panels_a = self._panels(len(a), loops.COLUMNS)
        packed_a = _with_slack(panels_a, *self.a_size, loops.COLUMNS)
        loops.pack(d, 0, 0, packed_d)
        loops.pack(a, *self.padding, packed_a)
        if not self.transforms:
            d_panels = packed_d.reshape(panels_d, -1, loops.ROWS)
            return d_panels, packed_a.reshape(panels_a, -1, loops.COLUMNS), self.walk
        tiles = prod(self.tiles)
        transformed_d = _with_slack(panels_d, loops.PRODUCTS, tiles + 1, loops.ROWS)
        transformed_a = np.empty((panels_a, loops.PRODUCTS, tiles, loops.COLUMNS), np.float32)
        loops.transform_gradient(packed_d, transformed_d)
        loops.transform_input(packed_a, transformed_a)
        return transformed_d, transformed_a

    def fold(self, examples: slice, *rest: Any) -> None:
        """Pack, form and fold some examples; the rest is what the kernel takes last."""
        both = self.factors.output_gradient[examples], self.factors.input[examples]
        d, a = (wide(x if x.ndim == 4 else x[:, :, None]).contiguous().numpy() for x in both)
        sizes = self.padding, self.d_size, self.a_size
        kernels().fold_planes(d, a, *sizes, self.transforms, self.walk, *rest)


def _with_slack(*shape: int) -> np.ndarray:
    """Return zeros with room for one vector more behind them."""
    size = prod(shape)
    return np.zeros(size + kernels().WIDTH, np.float32)[:size].reshape(shape)


def _plane(sizes: Sequence[int], missing: int = 1) -> tuple[int, int]:
    """Return two sizes: those of one dimension are those of a plane of a single line."""
    return (missing, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def _image(x: Tensor) -> np.ndarray:
    """Return one example's channels as planes."""
    return wide(x if x.ndim == 3 else x[:, None]).contiguous().numpy()
