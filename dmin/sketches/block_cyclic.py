"""Block-cyclic sign-and-fold: OPORP's accuracy with no stored permutation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from dmin.gradients.factors import Dense, GradientFactors
from dmin.gradients.parameters import Parameter, Parameters
from dmin.runtime.errors import DminError
from dmin.sketches.backends import cpu as forming
from dmin.sketches.backends import gpu
from dmin.sketches.base import Accumulator, FoldedSketch
from dmin.sketches.hashing import hash_words, key, signs

if TYPE_CHECKING:
    from dmin.sketches.backends.cpu_kernels import Fold


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

    def bind(self, parameters: Parameters) -> Self:
        """Return this sketch for the parameters of one model."""
        bound = super().bind(parameters)
        bound._blocks, bound._keys = {}, {}
        return bound

    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Fold the gradients of one parameter while they are formed."""
        parameter = self.parameters.by_name[name]
        values = state.values[:, parameter.group]
        norms = state.squared_norm[:, parameter.group] if self.norm_kind == "exact" else None
        if self._triton(values):
            blocks, sign = self._sorted_blocks(parameter, values.device), self._key(name, "sign")
            whole = factors, parameter.shape, blocks, self.block, sign
            gpu.fold_blocks(*whole, values, norms, state.budget)
        elif self._loops(values) and len(parameter.shape) < 2 and isinstance(factors, Dense):
            self._wait(state, parameter, factors.gradient)
        elif self._loops(values):
            map_ = self.kernel_map(parameter)
            forming.fold_factors(factors, parameter.shape, map_, values, norms, state.budget)
        else:
            super().add(state, name, factors)

    def fold(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return buckets and signs of one parameter, hashed afresh."""
        shape = self.parameters.by_name[name].shape
        rows, width = self._rows(shape)
        blocks, words = -(-width // self.block), -(-width // 32)
        offsets = hash_words(self._key(name, "offset"), rows * blocks, device)
        bucket = offsets[:, None] % self.dim + torch.arange(self.block, device=device)
        bucket = bucket.view(rows, -1)[:, :width] % self.dim
        sign = signs(self._key(name, "sign"), rows * words * 32, device)
        sign = sign.view(rows, -1)[:, :width]
        return forming.taps_last(bucket, shape), forming.taps_last(sign, shape)

    def kernel_map(self, parameter: Parameter) -> Fold:
        """Return the same map for the loops of the CPU: rows are k + b long, to be wrapped."""
        rows, width = self._rows(parameter.shape)
        blocks, words = -(-width // self.block), -(-width // 32)
        return forming.block_cyclic(
            self._key(parameter.name, "sign"),
            rows * words,
            self._key(parameter.name, "offset"),
            rows * blocks,
            self.dim,
            self.block,
        )

    def _sorted_blocks(self, parameter: Parameter, device: torch.device) -> gpu.Blocks:
        """Return the same map for a GPU: 8 bytes a block, kept, since sorting takes a while."""
        kept = parameter.name, device
        if kept not in self._blocks:
            rows, width = self._rows(parameter.shape)
            count = rows * -(-width // self.block)
            offsets = hash_words(self._key(parameter.name, "offset"), count, device) % self.dim
            self._blocks[kept] = gpu.sorted_blocks(offsets, self.dim, self.block)
        return self._blocks[kept]

    def _add_together(
        self,
        state: Accumulator,
        group: int,
        parameters: Sequence[Parameter],
        gradients: Sequence[Tensor],
    ) -> None:
        """Fold the gradients of vectors."""
        keys = [(self._key(p.name, "sign"), self._key(p.name, "offset")) for p in parameters]
        norms = state.squared_norm[:, group] if self.norm_kind == "exact" else None
        forming.fold_vectors(gradients, keys, self.block, state.values[:, group], norms)

    def _key(self, name: str, what: str) -> int:
        if (name, what) not in self._keys:
            self._keys[name, what] = key(self.seed, name, what)
        return self._keys[name, what]

    _blocks: dict[tuple[str, torch.device], gpu.Blocks]
    _keys: dict[tuple[str, str], int]

    @staticmethod
    def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many rows a parameter has, those of all taps, and how wide they are."""
        taps, out, width = forming.as_matrices(shape)
        return taps * out, width
