"""Block-cyclic sign-and-fold: OPORP's accuracy with no stored permutation."""

from typing import Any

from dmin.gradients.parameters import Parameter
from dmin.runtime.errors import DminError
from dmin.sketches.base import FoldedSketch
from dmin.sketches.hashing import key
from dmin.sketches.maps import BlockCyclicMap, Map


class BlockCyclic(FoldedSketch):
    """Cut the gradient into blocks, multiply by random signs, add each block at a random offset.

    ``(S g)[c] = Σ_j s_j g_j [ (i_j + r_⌊j⌋) mod k = c ]`` ,

    where entry j has position i_j in its block ⌊j⌋. The signs s and the offsets r, uniform on
    [0, k), are independent and hashed from (seed, parameter name). A block is a run of b inputs in
    a row of the weight, or of one tap of a convolution's kernel, so entries that are formed
    together are adjacent. Two entries of one block never collide (b ≤ k); two of different blocks
    collide with probability exactly 1/k. Hence ``E⟨S g, S h⟩ = ⟨g, h⟩`` and
    ``Var⟨S g, S h⟩ ≤ (‖g‖²‖h‖² + ⟨g, h⟩²) / k``, OPORP's bound (Li & Li, arXiv 2302.03505), for
    every vector. (A fold at fixed strides does not satisfy it, because outlier channels collide.)
    No state of the parameters' size is kept.

    Args:
        dim: k, at least the block.
        seed: key of signs and offsets.
        block: b, adjacent entries with a common offset, for sequential memory access.
    """

    family = "block_cyclic"

    def __init__(self, dim: int = 4096, seed: int = 0, block: int = 256) -> None:
        super().__init__(dim, seed)
        if not 1 <= block <= dim:
            raise DminError(
                f"sketch.block={block} with sketch.dim={dim}: a block must fit into the sketch, "
                f"otherwise its entries would collide. Set sketch.block to at most {dim}."
            )
        self.block = block
        self.folds: int | None = block

    def describe(self) -> dict[str, Any]:
        """Return the settings that define the map."""
        return {**super().describe(), "block": self.block}

    def map_of(self, parameter: Parameter) -> Map:
        """Return the map of one parameter: two keys, hashed to signs and offsets when evaluated."""
        if parameter.name not in self._kept:
            self._kept[parameter.name] = self._map(parameter)
        return self._kept[parameter.name]

    def _map(self, parameter: Parameter) -> Map:
        sign, offset = (key(self.seed, parameter.name, what) for what in ("sign", "offset"))
        return BlockCyclicMap(parameter.shape, self.dim, self.block, sign, offset)
