"""The sink protocol: receives the gradient factors of a backward pass, layer by layer."""

from typing import Protocol, TypeVar

from torch import Tensor

from dmin.gradients.factors import GradientFactors
from dmin.gradients.parameters import Parameters

State = TypeVar("State")
Rows = TypeVar("Rows", covariant=True)


class Sink(Protocol[State, Rows]):
    """Receives each parameter's per-example gradients, as factors, when backward reaches them.

    A pass over a batch is ``state = begin(...)``, ``add(state, name, factors)`` once for each
    parameter that has a gradient, in any order, and ``finish(state)``. The state holds everything
    about a pass, so passes may overlap.
    """

    @property
    def parameters(self) -> Parameters:
        """The attributed parameters."""

    def begin(self, batch: int, like: Tensor, budget: int) -> State:
        """Start a pass over a batch.

        Args:
            batch: number of examples.
            like: a tensor with the device and dtype of the results (float32 or float64).
            budget: most bytes of per-example gradients in memory at once.
        """

    def add(self, state: State, name: str, factors: GradientFactors) -> None:
        """Receive the gradients of one parameter for the whole batch."""

    def finish(self, state: State) -> Rows:
        """Return the result of the pass."""
