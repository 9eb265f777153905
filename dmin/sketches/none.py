"""No compression: the full gradient, for tests and small models."""

from collections.abc import Callable
from math import prod
from typing import Any, Self

from torch import Tensor

from dmin.gradients.parameters import Parameters
from dmin.runtime.errors import DminError
from dmin.sketches.base import Accumulator, FormedSketch


class FullGradient(FormedSketch):
    """The identity: every group's gradients one behind the other, k = P.

    ``⟨S g, S h⟩ = ⟨g, h⟩`` exactly. A row has as many numbers as the largest group has parameters;
    smaller groups end in zeros.

    Args:
        max_dim: refuse a row of more numbers than this.
    """

    family = "none"

    def __init__(self, max_dim: int = 1 << 24) -> None:
        super().__init__()
        self.max_dim = max_dim

    def bind(self, parameters: Parameters) -> Self:
        """Return this sketch with a place for each parameter of one model.

        Raises:
            DminError: a row would have more than ``max_dim`` numbers.
        """
        ends = [0] * len(parameters.groups)
        places = {}  # of each parameter, the first of its numbers
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
        """Return what adds a parameter's gradients at its place."""
        start = self._kept[name]

        def project(gradient: Tensor, rows: Tensor) -> None:
            rows[:, start : start + gradient.shape[1]] += gradient

        return project

    def variance(self, name: str, g: Tensor, h: Tensor) -> Tensor:
        """Return zeros, ``[n]``."""
        return g.new_zeros(len(g))

    def _check_dim(self, parameters: Parameters) -> None:
        """Any model will do: k follows from it."""
