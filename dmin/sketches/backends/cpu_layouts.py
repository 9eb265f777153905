"""Memory layouts of a layer call's factors, and the CPU loops that read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dmin.gradients.factors import Correlation, Outer

if TYPE_CHECKING:
    from dmin.sketches.backends.cpu_kernels import Walk


@cache
def kernels() -> Any:
    """Return the compiled loops, imported on first use because that takes a second."""
    from dmin.sketches.backends import cpu_kernels

    return cpu_kernels


class Layout(ABC):
    """Factors of one layer call in a memory layout that the loops can read."""

    fold: Any  # the loop that packs, forms and folds several examples
    of_part: Any  # the loop that forms and folds a part of one packed example
    bytes: int  # size of one example's factors

    @property
    @abstractmethod
    def settings(self) -> tuple[Any, ...]:
        """Arguments of :attr:`fold` that describe the layer, after the factors."""

    @abstractmethod
    def arrays(self, examples: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return output gradients and inputs of some examples."""

    @abstractmethod
    def pack(self, example: int) -> Sequence[Any]:
        """Return the packed factors of an example: the first arguments of :attr:`of_part`."""


class Tokens(Layout):
    """Outer products: channels are contiguous in memory."""

    def __init__(self, factors: Outer) -> None:
        self.factors = factors
        self.fold: Any = kernels().fold_tokens
        self.of_part: Any = kernels().form_and_fold
        self.bytes: int = 4 * (factors.output_gradient[0].numel() + factors.input[0].numel())

    @property
    def settings(self) -> tuple[Any, ...]:
        """The walk along the positions."""
        positions = self.factors.input.shape[1]
        return (kernels().Walk(1, positions, 0, 1, _FIRST),)

    def arrays(self, examples: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return output gradients and inputs of some examples."""
        d, a = self.factors.output_gradient[examples], self.factors.input[examples]
        return d.detach().float().contiguous().numpy(), a.detach().float().contiguous().numpy()

    def pack(self, example: int) -> Sequence[Any]:
        """Return the packed factors of an example."""
        loops, packed = kernels(), []
        panels = loops.ROWS, loops.COLUMNS
        both = self.arrays(slice(example, example + 1))
        for (one,), panel in zip(both, panels, strict=True):
            out = np.zeros((-(-one.shape[1] // panel), len(one), panel), np.float32)
            loops.pack_rows(one, out)
            packed.append(out)
        return *packed, *self.settings


_FIRST = np.zeros(1, np.int64)


class Planes(Layout):
    """Correlations that satisfy :func:`in_positions`: positions are contiguous in memory."""

    def __init__(self, factors: Correlation, transform: bool = True) -> None:
        loops = kernels()
        self.factors = factors
        self.fold: Any = loops.fold_planes
        layer = factors.layer
        self.kernel_size: tuple[int, int] = _plane(layer.kernel_size)
        self.stride: tuple[int, int] = _plane(layer.stride)
        self.dilation: tuple[int, int] = _plane(layer.dilation)
        self.padding: tuple[int, int] = _plane(factors.padding, 0)
        self.positions: tuple[int, int] = _plane(factors.output_gradient.shape[2:])
        size = prod(self.positions)
        self.tiles: list[int] = [-(-n // loops.TILE) for n in self.positions]
        simple = (self.kernel_size, self.stride, self.dilation) == ((3, 3), (1, 1), (1, 1))
        transformed = loops.PRODUCTS * prod(self.tiles) + loops.TRANSFORM_COST
        self.transforms = transform and simple and transformed < 9 * size
        if self.transforms:
            self.of_part: Any = loops.form_transformed_and_fold
            height, width = (loops.TILE * n for n in self.tiles)
            self.d_size, self.a_size = (height, width), (height + 2, width + 2)
        else:
            self.of_part = loops.form_and_fold
            self.d_size = self.positions
            reach = zip(self.positions, self.stride, self.kernel_size, self.dilation, strict=True)
            height, width = ((n - 1) * s + (k - 1) * d + 1 for n, s, k, d in reach)
            self.a_size = height, width
        self.bytes: int = 4 * (factors.output_gradient[0].numel() + factors.input[0].numel())

    @property
    def settings(self) -> tuple[Any, ...]:
        """Arguments of :func:`fold_planes` that describe the layer."""
        return self.padding, self.d_size, self.a_size, self.transforms, self.walk

    def arrays(self, examples: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors of some examples as the loops read them."""
        d, a = self.factors.output_gradient[examples], self.factors.input[examples]
        return _images(d), _images(a)

    @property
    def borders(self) -> list[int]:
        """Padding of the inputs in the format of ``F.pad``; negative where pixels are unused."""
        top, left = self.padding
        height, width = _plane(self.factors.input.shape[2:])
        (down, across), (up, before) = self.a_size, (top, left)
        return [before, across - width - before, up, down - height - up]

    @cached_property
    def walk(self) -> Walk:
        """Which input pixel each output position reads, for each tap."""
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
        """Return the packed factors of an example: the first arguments of :attr:`of_part`."""
        loops = kernels()
        (d,), (a,) = self.arrays(slice(example, example + 1))
        panels_d = -(-len(d) // loops.ROWS)
        packed_d = _with_slack(panels_d, *self.d_size, loops.ROWS)
        panels_a = -(-len(a) // loops.COLUMNS)
        packed_a = _with_slack(panels_a, *self.a_size, loops.COLUMNS)
        loops.pack(d, 0, 0, packed_d)
        loops.pack(a, *self.padding, packed_a)
        if not self.transforms:
            d_panels = packed_d.reshape(panels_d, -1, loops.ROWS)
            return d_panels, packed_a.reshape(panels_a, -1, loops.COLUMNS), self.walk
        tiles = prod(self.tiles)
        transformed_d = _with_slack(panels_d, loops.PRODUCTS, tiles + 1, loops.ROWS)
        shape = panels_a, loops.PRODUCTS, tiles + 1, loops.COLUMNS
        transformed_a = np.empty(shape, np.float32)
        loops.transform(packed_d, transformed_d, False)
        loops.transform(packed_a, transformed_a, True)
        return transformed_d, transformed_a


def _with_slack(*shape: int) -> np.ndarray:
    """Return zeros with one more vector of memory allocated behind them."""
    size = prod(shape)
    return np.zeros(size + kernels().WIDTH, np.float32)[:size].reshape(shape)


def _plane(sizes: Sequence[int], missing: int = 1) -> tuple[int, int]:
    """Return two sizes; a single dimension becomes the second, with ``missing`` as the first."""
    return (missing, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def _images(x: Tensor) -> np.ndarray:
    """Return channels as planes, ``[examples, channels, height, width]``."""
    return (x if x.ndim == 4 else x[:, :, None]).detach().float().contiguous().numpy()
