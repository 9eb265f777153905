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
    """The result of one backward pass: sketch and squared gradient norm of each example."""

    values: Tensor  # [batch, groups, k]
    squared_norm: Tensor  # [batch, groups], of the gradient if norm_kind is "exact"


class Accumulator:
    """The state of one pass: rows that are summed over the parameters, and the backend.

    Args:
        sketch: the sketch that computes the rows.
        batch: number of examples.
        like: a tensor with the device and dtype of the rows.
        budget: most bytes of per-example gradients in memory at once.
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
    """A random linear map S from the gradients of a model to k dimensions per group.

    ``E⟨S g, S h⟩ = ⟨g, h⟩``: inner products are unbiased, with the variance bound that each family
    states. The map is keyed by (seed, parameter name), so it is the same in every process, on
    every device, for every batch and in any order of layers.

    A pass over a batch is ``state = begin(...)``, then ``add(state, name, factors)`` for each
    parameter as backward reaches it, then ``finish(state)``. The sketch holds no state of a pass.

    Args:
        dim: k, the dimensions of each group.
        seed: key of the map. Stores are comparable only if they have the same seed.
    """

    family: str
    norm_kind = "exact"
    kernels: Kernels = "auto"  # selects the evaluation of the map, never the map itself
    # If k' divides k and is a multiple of `folds`, y[c] = Σ_{j mod k' = c} x[j] maps a row of
    # k dimensions to exactly the row of k' dimensions. None: rows cannot be folded.
    folds: int | None = None
    # Increased whenever the map changes for equal settings; part of the fingerprint from 2 on.
    revision = 1

    def __init__(self, dim: int = 4096, seed: int = 0) -> None:
        if dim < 1:
            raise DminError(
                f"sketch.dim={dim}: the sketch needs at least one dimension; 4096 is usual."
            )
        self.dim = dim
        self.seed = seed
        self._parameters: Parameters | None = None
        self._kept: dict[Any, Any] = {}  # cache of values that depend on the bound parameters

    def bind(self, parameters: Parameters) -> Self:
        """Return this sketch for the parameters of one model.

        Raises:
            DminError: k exceeds the number of parameters, so nothing would be compressed.
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
            like: a tensor with the device and dtype of the rows (float32 or float64).
            budget: most bytes of per-example gradients in memory at once.
        """
        return Accumulator(self, batch, like, budget)

    @abstractmethod
    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Add the sketches of one parameter's gradients to the rows."""

    def finish(self, state: Accumulator) -> Sketched:
        """Return the finished rows."""
        state.backend.finish()
        return Sketched(state.values, state.squared_norm)

    def of(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the sketch of full gradients: the oracle of tests, and for vectors of any origin.

        Args:
            gradients: for each parameter name a tensor ``[batch, *shape]``; missing ones are zero.

        Returns:
            ``[batch, groups, k]``.
        """
        first = next(iter(gradients.values()))
        state = self.begin(len(first), first.new_zeros((), dtype=wide_dtype(first)))
        for name, gradient in gradients.items():
            self.add(state, name, Dense(gradient))
        return self.finish(state).values

    def adjoint(self, row: Tensor) -> dict[str, Tensor]:
        """Return ``Sᵀ row``: ``⟨Sᵀ row, g⟩ = ⟨row, S g⟩`` for every g.

        Args:
            row: ``[groups, k]``.

        Returns:
            For each parameter name a tensor ``[*shape]``.
        """
        plain = copy.copy(self)
        plain.kernels, plain.norm_kind = "torch", "sketch"  # autograd can differentiate these
        with torch.enable_grad():
            at = {
                each.name: row.new_zeros(1, *each.shape, requires_grad=True)
                for each in self.parameters.entries
            }
            value = (plain.of(at)[0] * row).sum()
        found = torch.autograd.grad(value, list(at.values()))
        return {name: gradient[0] for name, gradient in zip(at, found, strict=True)}

    def variance(self, name: str, g: Tensor, h: Tensor) -> Tensor:
        """Return the family's bound of ``Var⟨S g, S h⟩`` for gradients of a single parameter.

        For several parameters, take ``(‖g‖²‖h‖² + ⟨g, h⟩²) / k`` of all and add each one's excess.

        Args:
            name: name of the parameter.
            g: gradients of this parameter, ``[n, *shape]``.
            h: the gradients paired with g, ``[n, *shape]``.

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
    """A sketch that forms the gradients of a few examples at a time and reduces them at once."""

    @abstractmethod
    def projection(self, name: str, state: Accumulator) -> Callable[[Tensor, Tensor], None]:
        """Return the map of one parameter as a function.

        Args:
            name: name of the parameter.
            state: the state of the pass: device and dtype of gradients and rows, and the backend.

        Returns:
            A function of gradients ``[n, P]`` and rows ``[n, k]`` that adds the sketches to the
            rows. It may overwrite the gradients.
        """

    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Form the gradients of one parameter, add their squared norms, and project them."""
        parameter = self.parameters.by_name[name]
        rows, project = state.groups[parameter.group], self.projection(name, state)
        project_formed(factors, prod(parameter.shape), rows, state.budget, project)


class FoldedSketch(Sketch):
    """A sketch with one bucket and one sign per scalar: signed entries are summed in buckets."""

    @abstractmethod
    def map_of(self, parameter: Parameter) -> Map:
        """Return the map of one parameter."""

    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Fold the gradients of one parameter."""
        parameter = self.parameters.by_name[name]
        state.backend.fold(factors, self.map_of(parameter), state.groups[parameter.group])

    def fold(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the bucket and sign of each scalar of a flattened parameter, each ``[P]``."""
        return self.map_of(self.parameters.by_name[name]).buckets(device)
