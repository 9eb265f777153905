"""Block-cyclic sign-and-fold: OPORP's accuracy with no stored permutation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmin.errors import DminError
from dmin.layer_gradients import GradientFactors
from dmin.sketches import forming
from dmin.sketches.base import Accumulator, FoldedSketch, Parameter
from dmin.sketches.hashing import hash_words, key, signs

if TYPE_CHECKING:
    from dmin.sketches.cpu_kernels import Fold


class BlockCyclic(FoldedSketch):
    """Cut the gradient into blocks, flip signs at random, add each block at a random offset.

    ``(S g)[c] = Σ_j s_j g_j [ (i_j + r_⌊j⌋) mod k = c ]`` ,

    where entry j is number i_j of its block ⌊j⌋, with independent signs s and offsets r, uniform on
    [0, k), both hashed from (seed, parameter name). A block is a run of b inputs in a row of the
    weight, or in a row for one tap of a convolution's kernel: what is formed together lies
    together. Two entries of one block never collide (b ≤ k), two of different blocks with
    probability exactly 1/k; hence ``E⟨S g, S h⟩ = ⟨g, h⟩`` and
    ``Var⟨S g, S h⟩ ≤ (‖g‖²‖h‖² + ⟨g, h⟩²) / k``, OPORP's bound (Li & Li, arXiv
    2302.03505), for every vector. (A fold at fixed strides does not have it: outlier channels
    collide.) It keeps nothing of the parameters' size.

    Args:
        dim: k, at least the block.
        seed: key of signs and offsets.
        block: b, neighbouring entries that move together; it makes memory access sequential.
    """

    family = "block_cyclic"

    def __init__(self, dim: int = 4096, seed: int = 0, block: int = 256) -> None:
        super().__init__(dim, seed)
        if not 1 <= block <= dim:
            raise DminError(
                f"sketch.block={block} with sketch.dim={dim}: a block must fit into the sketch, "
                f"or its entries would collide. Set sketch.block to at most {dim}."
            )
        self.block = block
        self.folds = block

    def describe(self) -> dict[str, Any]:
        """Return the settings that define the map."""
        return {**super().describe(), "block": self.block}

    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Fold the gradients of one parameter while they are formed."""
        if not forming.applies(state.values):
            super().add(state, name, factors)
            return
        parameter = self._bound.by_name[name]
        exact = self.norm_kind == "exact"
        forming.fold_factors(
            factors,
            parameter.shape,
            self.kernel_map(parameter),
            state.values[:, parameter.group],
            state.squared_norm[:, parameter.group] if exact else None,
            state.budget,
        )

    def fold(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return buckets and signs of one parameter, hashed afresh."""
        shape = self._bound.by_name[name].shape
        rows, width = self._rows(shape)
        blocks, words = -(-width // self.block), -(-width // 32)
        offsets = hash_words(key(self.seed, name, "offset"), rows * blocks, device)
        bucket = offsets[:, None] % self.dim + torch.arange(self.block, device=device)
        bucket = bucket.view(rows, -1)[:, :width] % self.dim
        sign = signs(key(self.seed, name, "sign"), rows * words * 32, device)
        sign = sign.view(rows, -1)[:, :width]
        return forming.taps_last(bucket, shape), forming.taps_last(sign, shape)

    def kernel_map(self, parameter: Parameter) -> Fold:
        """Return the same map for the loops of the CPU: rows are k + b long, to be wrapped."""
        rows, width = self._rows(parameter.shape)
        blocks, words = -(-width // self.block), -(-width // 32)
        return forming.block_cyclic(
            key(self.seed, parameter.name, "sign"),
            rows * words,
            key(self.seed, parameter.name, "offset"),
            rows * blocks,
            self.dim,
            self.block,
        )

    @staticmethod
    def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many rows a parameter has, those of all taps, and how wide they are."""
        taps, out, width = forming.as_matrices(shape)
        return taps * out, width
