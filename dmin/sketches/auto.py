"""The default sketch: for each parameter the cheaper of two equally accurate maps."""

from typing import Self

from dmin.gradients.parameters import Parameters
from dmin.sketches.base import Accumulator, Sketched
from dmin.sketches.block_cyclic import BlockCyclic
from dmin.sketches.tensor_sketch import TensorSketch


class Auto(TensorSketch):
    """TensorSketch for large matrices, block-cyclic sign-and-fold for everything else.

    Both have OPORP's bound, ``Var⟨S g, S h⟩ ≤ (‖g‖²‖h‖² + ⟨g, h⟩²) / k`` (TensorSketch up to
    factors near one, and for sides of at most k entries; see there). So has their sum, since the
    maps of different parameters are independent. The choice is therefore one of cost. A matrix
    of at least ``from_size`` entries is sketched from its factors faster than it can be formed.
    Smaller matrices, most kernels, and vectors are formed and then folded.

    A parameter's shape alone selects its map: not k, so that rows can be folded to a smaller k,
    and neither batch nor tokens. The evaluation of a map is selected by cost.

    Norms are exact if no parameter uses TensorSketch. Otherwise they are norms of the sketch, with
    a relative error of about ``(2k)^-½``.

    Args:
        dim: k.
        seed: key of the maps.
        block: block length of the block-cyclic map.
        from_size: smallest number of entries for which a matrix uses TensorSketch.
        from_kernel: the same for the kernel of a convolution.
    """

    family = "auto"

    def __init__(
        self,
        dim: int = 4096,
        seed: int = 0,
        block: int = 256,
        from_size: int = 1 << 18,
        from_kernel: int = 1 << 23,
    ) -> None:
        super().__init__(dim, seed, block, from_size, from_kernel)

    def bind(self, parameters: Parameters) -> Self:
        """Return this sketch for the parameters of one model."""
        bound = super().bind(parameters)
        if not any(map(self.tensor_sketched, parameters.entries)):
            bound.norm_kind = "exact"
        return bound

    def finish(self, state: Accumulator) -> Sketched:
        """Return the finished rows."""
        if self.norm_kind == "exact":
            return BlockCyclic.finish(self, state)
        return super().finish(state)
