"""No compression: the full gradient, for tests and small models."""

from collections.abc import Callable
from math import prod
from typing import Any, Self

from torch import Tensor

from dmin.gradients.parameters import Parameters
from dmin.runtime.errors import DminError
from dmin.sketches.base import Accumulator, FormedSketch


class FullGradient(FormedSketch):
    """The identity: the gradients of each group concatenated, k = P.

    ``⟨S g, S h⟩ = ⟨g, h⟩`` exactly. k is the number of parameters in the largest group; rows of
    smaller groups are padded with zeros.

    Args:
        max_dim: the largest k that is accepted.
    """

    family = "none"

    def __init__(self, max_dim: int = 1 << 24) -> None:
        super().__init__()
        self.max_dim = max_dim

    def bind(self, parameters: Parameters) -> Self:
        """Return this sketch with a range of a row for each parameter of one model.

        Raises:
            DminError: a row would have more than ``max_dim`` dimensions.
        """
        ends = [0] * len(parameters.groups)
        places = {}  # first dimension of each parameter
        for entry in parameters.entries:
            places[entry.name] = ends[entry.group]
            ends[entry.group] += prod(entry.shape)
        if max(ends) > self.max_dim:
            raise DminError(
                f"sketch=none keeps the full gradient, here {max(ends):,} dimensions a timestep "
                f"and group: {4 * max(ends):,} bytes for each example in memory. It is only for "
                f"small models; choose another sketch, or raise sketch.max_dim (now "
                f"{self.max_dim:,})."
            )
        bound = super().bind(parameters)
        bound.dim, bound._kept = max(ends), places
        return bound

    def describe(self) -> dict[str, Any]:
        """Return the settings that define the map: there are none."""
        return {"family": self.family}

    def projection(self, name: str, state: Accumulator) -> Callable[[Tensor, Tensor], None]:
        """Return a function that adds a parameter's gradients to its range of the rows."""
        start = self._kept[name]

        def project(gradient: Tensor, rows: Tensor) -> None:
            rows[:, start : start + gradient.shape[1]] += gradient

        return project

    def variance(self, name: str, g: Tensor, h: Tensor) -> Tensor:
        """Return zeros, ``[n]``."""
        return g.new_zeros(len(g))

    def _check_dim(self, parameters: Parameters) -> None:
        """Do nothing: k is determined by the model."""
