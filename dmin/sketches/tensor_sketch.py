"""TensorSketch: sketch a Linear weight's gradient from its factors, never forming it."""

from __future__ import annotations

from math import log2, prod
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from dmin.gradients.factors import Correlation, GradientFactors, Outer, Sum
from dmin.gradients.parameters import Parameter, Parameters
from dmin.sketches.backends import cpu as forming
from dmin.sketches.backends import gpu
from dmin.sketches.backends.spectra import add_spectra
from dmin.sketches.base import Accumulator, Sketched, add_at
from dmin.sketches.block_cyclic import BlockCyclic
from dmin.sketches.bounds import moments, share_of_equal
from dmin.sketches.hashing import key, signs, spread_words

if TYPE_CHECKING:
    from dmin.sketches.backends.cpu_kernels import Fold


class SpectralAccumulator(Accumulator):
    """Rows whose TensorSketch part is summed over positions and layers in the Fourier domain."""

    def __init__(self, batch: int, groups: int, dim: int, like: Tensor, budget: int) -> None:
        super().__init__(batch, groups, dim, like, budget)
        dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
        shape = (batch, groups, dim // 2 + 1)
        self.spectrum = torch.zeros(shape, dtype=dtype, device=like.device)


class TensorSketch(BlockCyclic):
    """Matrices and kernels by TensorSketch, from their factors; vectors block-cyclic.

    TensorSketch (Pham & Pagh 2013) puts entry (o, i) into ``bucket = (h₁(o) + h₂(i)) mod k`` with
    ``sign = s₁(o) s₂(i)``. For a gradient ``Σ_p d_p ⊗ a_p`` that is
    ``F⁻¹ Σ_p F(C₁ d_p) ∘ F(C₂ a_p)`` with count sketches C₁, C₂: the ``o·i`` multiplications of a
    position become ``k log k``, the gradient is never formed, and one inverse transform serves all
    positions and layers.

    Which map a parameter has depends on its shape alone. How the map is evaluated follows the cost:
    few entries or many positions are formed and folded all the same, to the same numbers.

    With independent hashes, entries of one row or column that share a bucket would cost gradients
    of rank one (adaLN) up to three times the variance of others: for G, H of unit norm, with
    M = GᵀH, N = GHᵀ, τ = tr M² = tr N², ``k·Var ≈ 1 + ρ² + ‖M‖² + ‖N‖² + 2τ``. So the hashes of
    each side are all different as long as there are as many buckets (:func:`spread_words`), which
    the published ones are not. Then, for k a power of two and n the larger side, rounded up to one,

    ``Var ≤ (1 + 1/(n−1)) (1 + 2/k) (‖G‖²‖H‖² + ρ²)/k + c_in (‖M‖² + τ) + c_out (‖N‖² + τ)``,

    where c is 0 for a side of at most k, and ``(n/k − 1)/(n − 1) < 1/k`` for a longer one of n:
    OPORP's bound, for every layer whose sides are not longer than the sketch.

    Norms are those of the sketch, since the gradient is not there to be measured.

    Args:
        dim: k.
        seed: key of the maps.
        block: of the block-cyclic map.
        from_size: entries from which a matrix is mapped by TensorSketch, a smaller one is
            block-cyclic; :class:`dmin.sketches.Auto` has a value by cost.
        from_kernel: entries from which the kernel of a convolution is, as a matrix of outputs by
            (tap, input). Those of many entries stand where positions are few.
    """

    family = "tensor_sketch"
    norm_kind = "sketch"

    # Nanoseconds an elementary step takes one CPU core: a position's transforms (for each k log k)
    # and the counting of a row or column, an entry's multiplication at a position, its folding.
    TRANSFORM, COUNT, FORM, FOLD = 0.2, 1.0, 0.008, 0.8
    # The same of a GPU in half precision, computed from an H200's figures (docs/performance.md).
    ON_GPU = 5e-4, 0.0, 3e-6, 2.5e-3

    def __init__(
        self,
        dim: int = 4096,
        seed: int = 0,
        block: int = 256,
        from_size: int = 1,
        from_kernel: int = 1,
    ) -> None:
        super().__init__(dim, seed, block)
        self.from_size = from_size
        self.from_kernel = from_kernel

    def bind(self, parameters: Parameters) -> Self:
        """Return this sketch for the parameters of one model."""
        bound = super().bind(parameters)
        bound._sides, bound._sent = {}, {}
        return bound

    def describe(self) -> dict[str, Any]:
        """Return the settings that define the map."""
        return {**super().describe(), "from_size": self.from_size, "from_kernel": self.from_kernel}

    def tensor_sketched(self, parameter: Parameter) -> bool:
        """Say whether a parameter is mapped by TensorSketch; its shape decides."""
        threshold = self.from_size if len(parameter.shape) == 2 else self.from_kernel
        return len(parameter.shape) > 1 and prod(parameter.shape) >= threshold

    def variance(self, name: str, g: Tensor, h: Tensor) -> Tensor:
        """Return the stated bound, ``[n]``; see the base class."""
        parameter = self.parameters.by_name[name]
        if not self.tensor_sketched(parameter):
            return super().variance(name, g, h)
        found, (out, inside) = moments(g, h), (parameter.shape[0], prod(parameter.shape[1:]))
        larger = 1 << (max(out, inside) - 1).bit_length()
        pairs = (1 + 1 / max(1, larger - 1)) * (1 + 2 / self.dim) / self.dim
        rows = share_of_equal(inside, self.dim) * (found.along + found.trace)
        columns = share_of_equal(out, self.dim) * (found.across + found.trace)
        return pairs * found.whole + rows + columns

    def begin(self, batch: int, like: Tensor, budget: int = 16 << 20) -> SpectralAccumulator:
        """Start the rows of a batch."""
        return SpectralAccumulator(batch, len(self.parameters.groups), self.dim, like, budget)

    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Add one parameter, from its factors where that is cheaper than forming it."""
        parameter = self.parameters.by_name[name]
        parts = factors.parts if isinstance(factors, Sum) else [factors]
        transformed = self.tensor_sketched(parameter) and all(map(_transforms, parts))
        positions = sum(map(_positions, parts)) if transformed else 0
        on_gpu, triton = state.values.is_cuda, self._triton(state.values)
        if not transformed or not self._transforms_are_cheaper(parameter.shape, positions, on_gpu):
            if triton and self.tensor_sketched(parameter):
                rows = state.values[:, parameter.group]
                sides = self._sides_on(parameter, rows.device)
                gpu.fold_tensor_sketch(factors, parameter.shape, sides, rows, state.budget)
            else:
                super().add(state, name, factors)
            return
        assert isinstance(state, SpectralAccumulator)
        spectrum = state.spectrum[:, parameter.group]
        for part in parts:
            if triton:
                outer = gpu.as_product(part)
                assert outer is not None
                gpu.add_spectra(
                    outer, self._sides_on(parameter, spectrum.device), self.dim, spectrum
                )
            elif self._loops(state.values):
                hashes = self._hashes(parameter, torch.device("cpu"))
                add_spectra(part, *hashes, self.dim, spectrum)
            else:
                self._add(state, parameter, part)

    def finish(self, state: Accumulator) -> Sketched:
        """Return the finished rows: one inverse transform for all TensorSketched parameters."""
        assert isinstance(state, SpectralAccumulator)
        self._add_waiting(state)
        values = state.values + torch.fft.irfft(state.spectrum, n=self.dim)
        return Sketched(values, values.square().sum(-1))

    def fold(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return buckets and signs of one parameter, by whichever map it has."""
        parameter = self.parameters.by_name[name]
        if not self.tensor_sketched(parameter):
            return super().fold(name, device)
        (row, row_sign), (column, column_sign) = self._hashes(parameter, device)
        bucket = (row[:, None] + column) % self.dim
        sign = row_sign[:, None] * column_sign
        taps, out, width = forming.as_matrices(parameter.shape)
        natural = (x.view(out, taps, width).transpose(1, 2).reshape(-1) for x in (bucket, sign))
        return next(natural), next(natural)

    def kernel_map(self, parameter: Parameter) -> Fold:
        """Return the map of one parameter, by whichever it has, for the loops of the CPU."""
        if not self.tensor_sketched(parameter):
            return super().kernel_map(parameter)
        row, column = self._hashes(parameter, torch.device("cpu"))
        return forming.tensor_sketch(row, column, self.dim)

    def _hashes(
        self, parameter: Parameter, device: torch.device
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return bucket and sign of each output, and of each input for each tap.

        They are kept, 12 bytes for each: a thousandth of the matrix, and sorted to be made.
        """
        kept = self._sides.get((parameter.name, device))
        if kept is not None:
            return kept
        sides = []
        taps, out, width = forming.as_matrices(parameter.shape)
        for side, size in (("row", out), ("column", taps * width)):
            bucket = spread_words(key(self.seed, parameter.name, side), size, device) % self.dim
            sign = signs(key(self.seed, parameter.name, side, "sign"), size, device)
            sides.append((bucket, sign))
        self._sides[parameter.name, device] = sides[0], sides[1]
        return sides[0], sides[1]

    def _transforms_are_cheaper(
        self, shape: tuple[int, ...], positions: int, on_gpu: bool = False
    ) -> bool:
        cpu = self.TRANSFORM, self.COUNT, self.FORM, self.FOLD
        transform, count, form, fold = self.ON_GPU if on_gpu else cpu
        entries, sides = prod(shape), shape[0] + prod(shape[1:])
        position = transform * self.dim * log2(self.dim) + count * sides
        return positions * position < entries * (form * positions + fold)

    def _sides_on(self, parameter: Parameter, device: torch.device) -> gpu.Sides:
        """Return the map for a GPU: made on the CPU, sent once, kept."""
        kept = parameter.name, device
        if kept not in self._sent:
            hashes = self._hashes(parameter, torch.device("cpu"))
            self._sent[kept] = gpu.sides(*hashes, self.dim, device)
        return self._sent[kept]

    def _add(
        self, state: SpectralAccumulator, parameter: Parameter, factors: GradientFactors
    ) -> None:
        """Sum ``F(C₁ d) ∘ F(C₂ a)`` over positions, as many at a time as the budget allows."""
        (row, row_sign), (column, column_sign) = self._hashes(parameter, state.values.device)
        spectrum = state.spectrum[:, parameter.group]
        positions = _positions(factors)
        # Two count sketches and two spectra, each of k numbers, stand in memory for a position.
        rows = max(1, state.budget // (4 * self.dim * state.values.element_size()))
        step = min(positions, rows)
        for first in range(0, factors.batch, max(1, rows // step)):
            examples = slice(first, first + max(1, rows // step))
            some = factors[examples]
            outer = some.as_outer() if isinstance(some, Correlation) else some
            assert isinstance(outer, Outer)
            for start in range(0, positions, step):
                d = outer.output_gradient[:, start : start + step].to(state.values.dtype)
                a = outer.input[:, start : start + step].to(state.values.dtype)
                left = torch.fft.rfft(self._count(d * row_sign.to(d.dtype), row))
                right = torch.fft.rfft(self._count(a * column_sign.to(a.dtype), column))
                spectrum[examples] += left.mul_(right).sum(1)

    _sent: dict[tuple[str, torch.device], gpu.Sides]
    _sides: dict[tuple[str, torch.device], tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]

    def _count(self, x: Tensor, bucket: Tensor) -> Tensor:
        """Return the count sketch ``[batch, positions, k]`` of signed entries."""
        counted = x.new_zeros(*x.shape[:-1], self.dim)
        add_at(counted.view(-1, self.dim), bucket, x.flatten(0, -2))
        return counted


def _transforms(factors: GradientFactors) -> bool:
    """Return whether a gradient's spectrum can be had from its factors."""
    if isinstance(factors, Correlation):
        return forming.Planes.serves(factors)
    return isinstance(factors, Outer)


def _positions(factors: GradientFactors) -> int:
    """Return how many outer products a gradient is the sum of."""
    if isinstance(factors, Correlation):
        return prod(factors.output_gradient.shape[2:])
    assert isinstance(factors, Outer)
    return factors.input.shape[1]
