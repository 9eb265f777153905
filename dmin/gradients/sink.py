"""The sink protocol: receives the gradient factors of a backward pass, layer by layer."""

from typing import Protocol, TypeVar

from torch import Tensor

from dmin.gradients.factors import GradientFactors
from dmin.gradients.parameters import Parameters

State = TypeVar("State")
Rows = TypeVar("Rows", covariant=True)


class Sink(Protocol[State, Rows]):
    """Takes each parameter's per-example gradients, in factors, as backward reaches them.

    A pass over a batch is ``state = begin(...)``, ``add(state, name, factors)`` once for each
    parameter that has a gradient, in any order, and ``finish(state)``. All that belongs to a pass
    is in its state, so passes may overlap.
    """

    @property
    def parameters(self) -> Parameters:
        """The parameters whose gradients are wanted."""

    def begin(self, batch: int, like: Tensor, budget: int) -> State:
        """Start a pass over a batch.

        Args:
            batch: number of examples.
            like: a tensor whose device and (wide) dtype results take.
            budget: bytes that per-example gradients may take at once.
        """

    def add(self, state: State, name: str, factors: GradientFactors) -> None:
        """Take the gradients of one parameter, of the whole batch."""

    def finish(self, state: State) -> Rows:
        """Return what the pass left."""
