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
    """TensorSketch of matrices and kernels, from their factors; vectors are block-cyclic.

    TensorSketch (Pham & Pagh 2013) puts entry (o, i) into ``bucket = (h₁(o) + h₂(i)) mod k`` with
    ``sign = s₁(o) s₂(i)``. A gradient ``Σ_p d_p ⊗ a_p`` becomes
    ``F⁻¹ Σ_p F(C₁ d_p) ∘ F(C₂ a_p)`` with the Fourier transform F and count sketches C₁, C₂. A
    position takes ``k log k`` multiplications instead of ``out·in``, the gradient is never formed,
    and one inverse transform suffices for all positions and layers.

    A parameter's shape alone selects its map. The evaluation is selected by cost: gradients with
    few entries or many positions are formed and folded instead, with the same result.

    With independent hashes, collisions within a row or column would give rank-one gradients
    (adaLN) up to three times the variance of others: for G, H of unit norm, with ρ = ⟨G, H⟩,
    M = GᵀH, N = GHᵀ, τ = tr M² = tr N², ``k·Var ≈ 1 + ρ² + ‖M‖² + ‖N‖² + 2τ``. Unlike the
    published hashes, those used here (:func:`spread_words`) are distinct on a side of at most k
    entries. Then, for k a power of two and n the larger side rounded up to a power of two,

    ``Var ≤ (1 + 1/(n−1)) (1 + 2/k) (‖G‖²‖H‖² + ρ²)/k + c_in (‖M‖² + τ) + c_out (‖N‖² + τ)``,

    where c is 0 for a side of at most k, and ``(n/k − 1)/(n − 1) < 1/k`` for a longer side, rounded
    up to n. Layers with no side longer than k thus have OPORP's bound, up to factors near one.

    Norms are those of the sketch, because the gradient is not formed.

    Args:
        dim: k.
        seed: key of the maps.
        block: block length of the block-cyclic map.
        from_size: smallest number of entries for which a matrix uses TensorSketch; smaller ones
            are block-cyclic. :class:`dmin.sketches.Auto` has a value chosen by cost.
        from_kernel: the same for the kernel of a convolution, viewed as a matrix of outputs ×
            (tap, input). Large kernels usually belong to layers with few positions.
    """

    family = "tensor_sketch"
    norm_kind = "sketch"

    # Nanoseconds per elementary step on one CPU core: transforms of a position (per k log k),
    # counting of a row or column entry, multiplication of an entry at a position, folding of it.
    TRANSFORM, COUNT, FORM, FOLD = 0.2, 1.0, 0.008, 0.8
    # The same for a GPU in half precision, computed from an H200's figures (docs/performance.md).
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
        """Return whether a parameter is mapped by TensorSketch, which its shape determines."""
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
        """Return the finished rows, after one inverse transform for all parameters."""
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
