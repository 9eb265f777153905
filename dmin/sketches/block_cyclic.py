"""Block-cyclic sign-and-fold: OPORP's accuracy with no stored permutation."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from dmin.errors import DminError
from dmin.sketches.base import FoldedSketch
from dmin.sketches.hashing import hash_words, key, signs


class BlockCyclic(FoldedSketch):
    """Cut the gradient into blocks, flip signs at random, add each block at a random offset.

    ``(S g)[c] = Σ_j s_j g_j [ (j mod b + r_⌊j/b⌋) mod k = c ]``

    with independent signs s and offsets r, uniform on [0, k), both hashed from (seed, parameter
    name). Two entries of one block never collide (b ≤ k), two of different blocks with probability
    exactly 1/k; hence ``E⟨S g, S h⟩ = ⟨g, h⟩`` and
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

    def fold(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return buckets and signs of one parameter, hashed afresh."""
        size = prod(self._bound.by_name[name].shape)
        offsets = hash_words(key(self.seed, name, "offset"), -(-size // self.block), device)
        within = torch.arange(self.block, device=device)
        bucket = (offsets[:, None] + within).view(-1)[:size] % self.dim
        return bucket, signs(key(self.seed, name, "sign"), size, device)
