"""The default sketch: for each parameter the cheaper of two equally accurate maps."""

from typing import Self

from dmin.gradients.parameters import Parameters
from dmin.sketches.base import Accumulator, Sketched
from dmin.sketches.block_cyclic import BlockCyclic
from dmin.sketches.tensor_sketch import TensorSketch


class Auto(TensorSketch):
    """TensorSketch for large matrices, block-cyclic sign-and-fold for everything else.

    Both have OPORP's bound, ``Var⟨S g, S h⟩ ≤ (‖g‖²‖h‖² + ⟨g, h⟩²) / k`` (TensorSketch but for
    factors near one, and for sides longer than k, see there); so has their sum, since the maps of
    different parameters are independent. So the choice is one of cost: a matrix of ``from_size``
    entries or more can be sketched from its factors in less time than it is formed in; smaller
    ones, most kernels and vectors are formed and folded, their entries in runs.

    Which map a parameter has depends on its shape alone: never on k, so that rows fold, nor on
    batch or tokens. How a map is evaluated follows the cost.

    Norms are exact for a model without such matrices, else those of the sketch, with a relative
    error of about ``(2k)^-½``.

    Args:
        dim: k.
        seed: key of the maps.
        block: of the block-cyclic map.
        from_size: entries from which a matrix is mapped by TensorSketch.
        from_kernel: entries from which the kernel of a convolution is.
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
