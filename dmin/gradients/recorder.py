"""A sink that keeps gradients in full, for checks."""

from collections.abc import Collection

import torch
from torch import Tensor

from dmin.gradients.factors import GradientFactors
from dmin.gradients.parameters import Parameters


class Recorder:
    """A sink that keeps full gradients by name.

    Args:
        parameters: the attributed parameters.
        full: names of those to keep in full; others get an empty tensor if they have a gradient.
            None keeps all.
    """

    def __init__(self, parameters: Parameters, full: Collection[str] | None = None) -> None:
        self.parameters = parameters
        self.full = parameters.by_name if full is None else full

    def begin(self, batch: int, like: Tensor, budget: int) -> dict[str, Tensor]:
        """Start a pass."""
        return {}

    def add(self, state: dict[str, Tensor], name: str, factors: GradientFactors) -> None:
        """Keep the gradients of one parameter."""
        state[name] = factors.dense() if name in self.full else torch.empty(0)

    def finish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients by name, ``[batch, *shape]``; unused parameters are missing."""
        return state
