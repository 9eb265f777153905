"""Spectra of TensorSketches from the factors of a gradient, on a CPU.

``Σ_p F(C₁ d_p) ∘ F(C₂ a_p)`` over positions p: counted, transformed and multiplied a few positions
at a time, so that nothing leaves the cache.
"""

from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmin.gradients.factors import Correlation, Outer
from dmin.sketches.backends.cpu_layouts import Planes, kernels
from dmin.sketches.backends.cpu_threads import in_threads
from dmin.sketches.maps import TensorSketchMap

CHUNK = 64  # positions; fixed, so that rounding does not depend on the number of threads


def add_spectra(factors: Outer | Correlation, map_: TensorSketchMap, spectrum: Tensor) -> None:
    """Add the spectra of one layer call's gradients.

    Args:
        factors: outer products, or correlations, that satisfy :func:`in_positions`.
        map_: the TensorSketch: count sketches of outputs, and of inputs for each kernel tap.
        spectrum: complex64 ``[batch, k // 2 + 1]``, changed in place.
    """
    from scipy.fft import rfft  # like numba, imported on first use

    sides = [(b.int().numpy(), s.float().numpy()) for b, s in map_.sides(spectrum.device)]
    walked = _Tokens(factors) if isinstance(factors, Outer) else _Patches(factors)
    starts = range(0, walked.positions, CHUNK)
    sums = np.zeros((factors.batch, len(starts), spectrum.shape[1]), np.complex64)

    def work(i: int) -> None:
        example, chunk = divmod(i, len(starts))
        first = starts[chunk]
        last = min(first + CHUNK, walked.positions)
        transformed = []
        for (x, walk), side in zip(walked.sides(example), sides, strict=True):
            counted = np.zeros((last - first, map_.dim), np.float32)
            kernels().count_sketch(x, walk, first, last, *side, counted)
            transformed.append(rfft(counted, axis=1, overwrite_x=True))
        kernels().add_products(*transformed, sums[example, chunk])

    in_threads(factors.batch * len(starts), work)
    spectrum += torch.from_numpy(sums.sum(1))


class _Tokens:
    """Outer products: a position has one row of output gradients and one of inputs."""

    def __init__(self, factors: Outer) -> None:
        self.factors = factors
        self.positions = factors.input.shape[1]
        self.walk = kernels().Walk(1, self.positions, 0, 1, np.zeros(1, np.int64))

    def sides(self, example: int) -> list[tuple[np.ndarray, Any]]:
        both = self.factors.output_gradient, self.factors.input
        return [(x[example].float().numpy(), self.walk) for x in both]


class _Patches:
    """Correlations: an output position reads a patch of the input."""

    def __init__(self, factors: Correlation) -> None:
        layer = Planes(factors, transform=False)
        self.positions = prod(layer.positions)
        own = kernels().Walk(1, self.positions, 0, 1, np.zeros(1, np.int64))
        d = factors.output_gradient.float().flatten(2).transpose(1, 2).contiguous()
        a = factors.input.float()
        a = F.pad(a if a.ndim == 4 else a[:, :, None], layer.borders)
        a = a.flatten(2).transpose(1, 2).contiguous()
        self._sides = [(d.numpy(), own), (a.numpy(), layer.walk)]

    def sides(self, example: int) -> list[tuple[np.ndarray, Any]]:
        return [(x[example], walk) for x, walk in self._sides]
