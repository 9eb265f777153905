"""TensorSketch: sketch a Linear weight's gradient from its factors, never forming it."""

from math import log2, prod
from typing import Any

import torch
from torch import Tensor

from dmin.gradients.factors import GradientFactors, Sum
from dmin.gradients.parameters import Parameter
from dmin.sketches.backends.base import in_positions, positions_of
from dmin.sketches.base import Accumulator, Sketch, Sketched
from dmin.sketches.block_cyclic import BlockCyclic
from dmin.sketches.bounds import moments, share_of_equal
from dmin.sketches.hashing import key
from dmin.sketches.maps import Map, TensorSketchMap


class SpectralAccumulator(Accumulator):
    """Rows whose TensorSketch part is summed over positions and layers in the Fourier domain."""

    def __init__(self, sketch: Sketch, batch: int, like: Tensor, budget: int) -> None:
        super().__init__(sketch, batch, like, budget)
        dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
        shape = (*self.values.shape[:2], sketch.dim // 2 + 1)
        self.spectrum: Tensor = torch.zeros(shape, dtype=dtype, device=like.device)


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
        return SpectralAccumulator(self, batch, like, budget)

    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Add one parameter, from its factors where that is cheaper than forming it."""
        parameter = self.parameters.by_name[name]
        map_, rows = self.map_of(parameter), state.groups[parameter.group]
        parts = factors.parts if isinstance(factors, Sum) else [factors]
        if isinstance(map_, TensorSketchMap) and all(map(in_positions, parts)):
            assert isinstance(state, SpectralAccumulator)
            positions, on_gpu = sum(map(positions_of, parts)), state.values.is_cuda
            if self._transforms_are_cheaper(parameter.shape, positions, on_gpu):
                for part in parts:
                    spectrum = state.spectrum[:, parameter.group]
                    state.backend.add_spectra(part, map_, spectrum)
                return
        state.backend.fold(factors, map_, rows)

    def finish(self, state: Accumulator) -> Sketched:
        """Return the finished rows: one inverse transform for all TensorSketched parameters."""
        assert isinstance(state, SpectralAccumulator)
        state.backend.finish()
        values = state.values + torch.fft.irfft(state.spectrum, n=self.dim)
        return Sketched(values, values.square().sum(-1))

    def _map(self, parameter: Parameter) -> Map:
        if not self.tensor_sketched(parameter):
            return super()._map(parameter)
        row, column = (
            (key(self.seed, parameter.name, side), key(self.seed, parameter.name, side, "sign"))
            for side in ("row", "column")
        )
        return TensorSketchMap(parameter.shape, self.dim, row, column)

    def _transforms_are_cheaper(
        self, shape: tuple[int, ...], positions: int, on_gpu: bool = False
    ) -> bool:
        cpu = self.TRANSFORM, self.COUNT, self.FORM, self.FOLD
        transform, count, form, fold = self.ON_GPU if on_gpu else cpu
        entries, sides = prod(shape), shape[0] + prod(shape[1:])
        position = transform * self.dim * log2(self.dim) + count * sides
        return positions * position < entries * (form * positions + fold)
