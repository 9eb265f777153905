"""What every sketch has in common: a random linear map from all gradients of a model to R^k."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dmin.gradients.factors import Dense, GradientFactors
from dmin.gradients.parameters import Parameter, Parameters
from dmin.runtime.errors import DminError
from dmin.sketches import bounds
from dmin.sketches.backends import cpu as forming
from dmin.sketches.backends import gpu


class Sketched(NamedTuple):
    """What one backward pass leaves: the sketch and the norm of each example's gradient."""

    values: Tensor  # [batch, groups, k]
    squared_norm: Tensor  # [batch, groups], of the gradient itself when `exact`


class Accumulator:
    """Rows under construction: sketches and squared norms of a batch, summed over layers."""

    def __init__(self, batch: int, groups: int, dim: int, like: Tensor, budget: int) -> None:
        self.values = like.new_zeros(batch, groups, dim)
        self.squared_norm = like.new_zeros(batch, groups)
        self.budget = budget
        # Gradients of vectors by group, which are sketched together: there are many, all small.
        self.waiting: dict[int, list[tuple[Parameter, Tensor]]] = defaultdict(list)
        self.entries = 0  # of an example, that wait


WAITING = 1 << 16  # entries of an example that may wait


class Sketch(ABC):
    """A random linear map S from the gradients of a model to k numbers a group.

    ``E⟨S g, S h⟩ = ⟨g, h⟩``: inner products survive in the mean, with the variance each family
    states. The map is keyed by (seed, parameter name), so it is the same in every process, on
    every device, for every batch and in any order of layers.

    A pass over a batch is ``state = begin(...)``, ``add(state, name, factors)`` for each parameter
    as backward reaches it, ``finish(state)``. The sketch itself holds no state of the pass.

    Args:
        dim: k, numbers kept for each group.
        seed: key of the map. Stores are comparable only when made with the same one.
    """

    family: str
    norm_kind = "exact"
    kernels: gpu.Kernels = "auto"  # how the map is evaluated, never which map it is
    # Sketches of k numbers fold by residue, y[c] = Σ_{j mod k' = c} x[j], to exactly the sketch of
    # k' where k' divides k and is a multiple of this; None: they do not.
    folds: int | None = None
    # Raised whenever the map changes for unchanged settings; a part of the fingerprint from 2 on.
    revision = 1

    def __init__(self, dim: int = 4096, seed: int = 0) -> None:
        if dim < 1:
            raise DminError(f"sketch.dim={dim}: the sketch needs at least one number, say 4096.")
        self.dim = dim
        self.seed = seed
        self._parameters: Parameters | None = None

    def bind(self, parameters: Parameters) -> Self:
        """Return this sketch for the parameters of one model.

        Raises:
            DminError: k exceeds the number of scalars, so nothing would be compressed.
        """
        self._check_dim(parameters)
        bound = copy.copy(self)
        bound._parameters = parameters
        return bound

    def describe(self) -> dict[str, Any]:
        """Return the settings that define the map, as JSON: a part of the feature fingerprint."""
        folds = {} if self.folds is None else {"folds": self.folds}
        revision = {} if self.revision == 1 else {"revision": self.revision}
        return {"family": self.family, "dim": self.dim, "seed": self.seed, **folds, **revision}

    def begin(self, batch: int, like: Tensor, budget: int = 16 << 20) -> Accumulator:
        """Start the rows of a batch.

        Args:
            batch: number of examples.
            like: a tensor whose device and (wide) dtype the rows take.
            budget: bytes that per-example gradients may take at once.
        """
        return Accumulator(batch, len(self.parameters.groups), self.dim, like, budget)

    @abstractmethod
    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Add the sketch of one parameter's gradients to the rows."""

    def finish(self, state: Accumulator) -> Sketched:
        """Return the finished rows."""
        self._add_waiting(state)
        return Sketched(state.values, state.squared_norm)

    def _wait(self, state: Accumulator, parameter: Parameter, gradient: Tensor) -> None:
        """Keep the gradient ``[batch, …]`` of a small parameter until there are some."""
        state.waiting[parameter.group].append((parameter, gradient.reshape(len(gradient), -1)))
        state.entries += prod(parameter.shape)
        if state.entries > WAITING:
            self._add_waiting(state)

    def _add_waiting(self, state: Accumulator) -> None:
        """Add the gradients that wait."""
        waiting, state.waiting, state.entries = state.waiting, defaultdict(list), 0
        for group, some in waiting.items():
            parameters, gradients = zip(*some, strict=True)
            self._add_together(state, group, parameters, gradients)

    def _add_together(
        self,
        state: Accumulator,
        group: int,
        parameters: Sequence[Parameter],
        gradients: Sequence[Tensor],
    ) -> None:
        """Add the gradients ``[batch, n]`` of small parameters of one group."""
        raise NotImplementedError

    def of(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the sketch of gradients given in full: the oracle, and the door for other vectors.

        Args:
            gradients: for each parameter name a tensor ``[batch, *shape]``; absent ones are zero.

        Returns:
            ``[batch, groups, k]``.
        """
        first = next(iter(gradients.values()))
        state = self.begin(len(first), first.new_zeros((), dtype=_wide_dtype(first)))
        for name, gradient in gradients.items():
            self.add(state, name, Dense(gradient))
        return self.finish(state).values

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

    def _loops(self, values: Tensor) -> bool:
        """Return whether rows like these are made by the compiled loops of the CPU."""
        plain = self.kernels == "torch" or self._triton(values)
        return not plain and forming.applies(values)

    def _triton(self, values: Tensor) -> bool:
        """Return whether rows like these are made by Triton's kernels."""
        return gpu.serves(values, self.kernels)

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
    """A sketch of gradients that are formed, a few examples at a time, and reduced at once.

    The examples whose gradients stand in memory together are as many as the budget allows, at
    least one: small slices also stay in the cache, which is where the time goes.
    """

    @abstractmethod
    def projection(self, name: str, like: Tensor) -> Callable[[Tensor, Tensor], None]:
        """Return the map of one parameter, ready for use.

        Args:
            name: of the parameter.
            like: a tensor whose device and dtype gradients and rows will have.

        Returns:
            A function that adds the sketches of gradients ``[n, P]``, which it may overwrite, to
            rows ``[n, k]``.
        """

    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Form, measure and project the gradients of one parameter."""
        parameter = self.parameters.by_name[name]
        values = state.values[:, parameter.group]
        norms = state.squared_norm[:, parameter.group]
        size = prod(parameter.shape)
        project = self.projection(name, values)
        step = max(1, state.budget // max(1, size * values.element_size()))
        for start in range(0, factors.batch, step):
            examples = slice(start, start + step)
            gradient = factors[examples].dense().to(values.dtype).reshape(-1, size)
            norms[examples] += torch.linalg.vector_norm(gradient, dim=1).square_()
            project(gradient, values[examples])
            del gradient  # before the next slice is formed, so that there is one at a time


class FoldedSketch(FormedSketch):
    """A sketch with one bucket and one sign for each scalar: signs flipped, buckets added up."""

    @abstractmethod
    def fold(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the map of one parameter.

        Returns:
            bucket: int64 ``[P]``, in [0, k), for each scalar of the flattened parameter.
            sign: float32 ``[P]``, ±1.
        """

    def projection(self, name: str, like: Tensor) -> Callable[[Tensor, Tensor], None]:
        """Return the map of one parameter, ready for use."""
        bucket, sign = self.fold(name, like.device)
        if self._loops(like):
            return lambda gradient, rows: forming.scatter(gradient, bucket, sign, rows)
        sign = sign.to(like.dtype)
        return lambda gradient, rows: add_at(rows, bucket, gradient.mul_(sign))


def add_at(rows: Tensor, bucket: Tensor, values: Tensor) -> None:
    """Add values ``[n, P]`` at buckets ``[P]`` to rows ``[n, k]``, in a fixed order.

    On a GPU ``index_add_`` adds in whatever order its threads come, ``index_put_`` sorts.
    """
    if rows.is_cuda:
        folded = rows.new_zeros(rows.shape[1], len(rows))
        rows += folded.index_put_((bucket.long(),), values.T, accumulate=True).T
    else:
        rows.index_add_(1, bucket, values)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
