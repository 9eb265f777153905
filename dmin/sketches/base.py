"""Base class of sketches: random linear maps from all gradients of a model to R^k."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dmin.gradients.factors import Dense, GradientFactors, wide_dtype
from dmin.gradients.parameters import Parameter, Parameters
from dmin.runtime.errors import DminError
from dmin.runtime.shown import Shown
from dmin.sketches import bounds
from dmin.sketches.backends import Kernels, backend_for
from dmin.sketches.backends.base import Backend, GroupRows
from dmin.sketches.backends.torch import project_formed
from dmin.sketches.maps import Map


class Sketched(NamedTuple):
    """What one backward pass leaves: the sketch and the norm of each example's gradient."""

    values: Tensor  # [batch, groups, k]
    squared_norm: Tensor  # [batch, groups], of the gradient itself when `exact`


class Accumulator:
    """Rows under construction, summed over the parameters of a model, and what adds to them.

    Args:
        sketch: whose rows they are.
        batch: number of examples.
        like: a tensor whose device and dtype the rows take.
        budget: bytes that per-example gradients may take at once.
    """

    def __init__(self, sketch: Sketch, batch: int, like: Tensor, budget: int) -> None:
        groups = len(sketch.parameters.groups)
        self.values: Tensor = like.new_zeros(batch, groups, sketch.dim)
        self.squared_norm: Tensor = like.new_zeros(batch, groups)
        self.budget = budget
        self.backend: Backend = backend_for(self.values, sketch.kernels, budget)
        exact = sketch.norm_kind == "exact"
        self.groups: list[GroupRows] = [
            GroupRows(self.values[:, g], self.squared_norm[:, g] if exact else None)
            for g in range(groups)
        ]


class Sketch(Shown, ABC):
    """A random linear map S from the gradients of a model to k dimensions a group.

    ``E⟨S g, S h⟩ = ⟨g, h⟩``: inner products survive in the mean, with the variance each family
    states. The map is keyed by (seed, parameter name), so it is the same in every process, on
    every device, for every batch and in any order of layers.

    A pass over a batch is ``state = begin(...)``, ``add(state, name, factors)`` for each parameter
    as backward reaches it, ``finish(state)``. The sketch itself holds no state of the pass.

    Args:
        dim: k, dimensions kept for each group.
        seed: key of the map. Stores are comparable only when made with the same one.
    """

    family: str
    norm_kind = "exact"
    kernels: Kernels = "auto"  # how the map is evaluated, never which map it is
    # Sketches of k dimensions fold by residue, y[c] = Σ_{j mod k' = c} x[j], to exactly the sketch
    # of k' where k' divides k and is a multiple of this; None: they do not.
    folds: int | None = None
    # Raised whenever the map changes for unchanged settings; a part of the fingerprint from 2 on.
    revision = 1

    def __init__(self, dim: int = 4096, seed: int = 0) -> None:
        if dim < 1:
            raise DminError(
                f"sketch.dim={dim}: the sketch needs at least one dimension; 4096 is usual."
            )
        self.dim = dim
        self.seed = seed
        self._parameters: Parameters | None = None
        self._kept: dict[Any, Any] = {}  # what is worked out once, of the parameters bound

    def bind(self, parameters: Parameters) -> Self:
        """Return this sketch for the parameters of one model.

        Raises:
            DminError: k exceeds the number of scalars, so nothing would be compressed.
        """
        self._check_dim(parameters)
        bound = copy.copy(self)
        bound._parameters, bound._kept = parameters, {}
        return bound

    def describe(self) -> dict[str, Any]:
        """Return the settings that define the map, as JSON: a part of the feature fingerprint."""
        folds = {} if self.folds is None else {"folds": self.folds}
        revision = {} if self.revision == 1 else {"revision": self.revision}
        return {"family": self.family, "dim": self.dim, "seed": self.seed, **folds, **revision}

    def facts(self) -> dict[str, Any]:
        """Return what defines the map."""
        return self.describe()

    def begin(self, batch: int, like: Tensor, budget: int = 16 << 20) -> Accumulator:
        """Start the rows of a batch.

        Args:
            batch: number of examples.
            like: a tensor whose device and (wide) dtype the rows take.
            budget: bytes that per-example gradients may take at once.
        """
        return Accumulator(self, batch, like, budget)

    @abstractmethod
    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Add the sketch of one parameter's gradients to the rows."""

    def finish(self, state: Accumulator) -> Sketched:
        """Return the finished rows."""
        state.backend.finish()
        return Sketched(state.values, state.squared_norm)

    def of(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the sketch of gradients given in full: the oracle, and the door for other vectors.

        Args:
            gradients: for each parameter name a tensor ``[batch, *shape]``; absent ones are zero.

        Returns:
            ``[batch, groups, k]``.
        """
        first = next(iter(gradients.values()))
        state = self.begin(len(first), first.new_zeros((), dtype=wide_dtype(first)))
        for name, gradient in gradients.items():
            self.add(state, name, Dense(gradient))
        return self.finish(state).values

    def adjoint(self, row: Tensor) -> dict[str, Tensor]:
        """Return ``Sᵀ row``, whose product with every g is ``⟨row, S g⟩``.

        Args:
            row: ``[groups, k]``.

        Returns:
            For each parameter name a tensor ``[*shape]``.
        """
        plain = copy.copy(self)
        plain.kernels, plain.norm_kind = "torch", "sketch"  # what autograd can transpose
        with torch.enable_grad():
            at = {
                each.name: row.new_zeros(1, *each.shape, requires_grad=True)
                for each in self.parameters.entries
            }
            value = (plain.of(at)[0] * row).sum()
        found = torch.autograd.grad(value, list(at.values()))
        return {name: gradient[0] for name, gradient in zip(at, found, strict=True)}

    def variance(self, name: str, g: Tensor, h: Tensor) -> Tensor:
        """Return the bound of ``Var⟨S g, S h⟩`` that the family states, of single parameters.

        For several parameters what it has beyond ``(‖g‖²‖h‖² + ⟨g, h⟩²) / k`` adds up.

        Args:
            name: of the parameter.
            g: gradients of it alone, ``[n, *shape]``.
            h: others, paired with these.

        Returns:
            ``[n]``.
        """
        return bounds.whole(g, h) / self.dim

    def _check_dim(self, parameters: Parameters) -> None:
        if self.dim > parameters.count:
            raise DminError(
                f"sketch.dim={self.dim} is larger than the {parameters.count:,} attributed "
                f"parameters: such a sketch only adds noise. Choose sketch.dim at most "
                f"{parameters.count}, in practice a tenth of it or less."
            )

    @property
    def parameters(self) -> Parameters:
        """The parameters that the sketch is bound to."""
        if self._parameters is None:
            raise RuntimeError("call sketch.bind(parameters) first")
        return self._parameters


class FormedSketch(Sketch):
    """A sketch of gradients that are formed, a few examples at a time, and reduced at once."""

    @abstractmethod
    def projection(self, name: str, state: Accumulator) -> Callable[[Tensor, Tensor], None]:
        """Return the map of one parameter, ready for use.

        Args:
            name: of the parameter.
            state: of the pass: device and dtype of gradients and rows, and the backend.

        Returns:
            A function that adds the sketches of gradients ``[n, P]``, which it may overwrite, to
            rows ``[n, k]``.
        """

    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Form, measure and project the gradients of one parameter."""
        parameter = self.parameters.by_name[name]
        rows, project = state.groups[parameter.group], self.projection(name, state)
        project_formed(factors, prod(parameter.shape), rows, state.budget, project)


class FoldedSketch(Sketch):
    """A sketch with one bucket and one sign for each scalar: signs flipped, buckets added up."""

    @abstractmethod
    def map_of(self, parameter: Parameter) -> Map:
        """Return the map of one parameter."""

    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Fold the gradients of one parameter."""
        parameter = self.parameters.by_name[name]
        state.backend.fold(factors, self.map_of(parameter), state.groups[parameter.group])

    def fold(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return bucket and sign of each scalar of a flattened parameter, ``[P]`` each."""
        return self.map_of(self.parameters.by_name[name]).buckets(device)
