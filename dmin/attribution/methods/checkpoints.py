"""Scores averaged over several models: checkpoints of one training, or trainings of one recipe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.method import Method
from dmin.attribution.methods.gradient_similarity import GradCos, GradDot
from dmin.attribution.methods.trak import DTRAK, TRAK
from dmin.runtime.errors import DminError
from dmin.store import Layout


class OverCheckpoints(Method):
    """Another method's score, averaged over models; each has stores and a fit of its own.

    ``I(q, i) = Σ_c w_c I_c(q, i) / Σ_c w_c``, c the model asked about and the further ones

    Args:
        method: whose scores.
        checkpoints: names of the further models: on the command line, their paths.
        weights: w_c, the model asked about first; None for equal ones. TracIn's is the learning
            rate at each checkpoint.

    Raises:
        DminError: another number of weights than of models.
    """

    name = "over_checkpoints"

    def __init__(
        self,
        method: Method,
        checkpoints: Sequence[str] = (),
        weights: Sequence[float] | None = None,
    ) -> None:
        names = tuple(str(name) for name in checkpoints)
        if weights is not None and len(weights) != 1 + len(names):
            raise DminError(
                f"method.weights has {len(weights)} numbers for {1 + len(names)} models; give one "
                f"for the model asked about and one for each of method.checkpoints."
            )
        self.method = method
        self.requires = replace(method.requires, checkpoints=names)
        total = float(sum(weights or [1.0] * (1 + len(names))))
        self.weights = [w / total for w in weights or [1.0] * (1 + len(names))]

    def fit(self, train: FeatureSet) -> None:
        """Fit a copy of the method for each model.

        Raises:
            DminError: there is only one model.
        """
        if not self.requires.checkpoints:
            raise DminError(
                f"method={self.name} is an average over several models, and only one is given. "
                f"Name the others: method.checkpoints=[path, …], each collected with the same "
                f"settings (dmin collect -m model.path=a,b,c), or take "
                f"method={self.method.name}."
            )
        sides = [train, *(train.checkpoints[name] for name in self.requires.checkpoints)]
        self.methods = [copy.deepcopy(self.method) for _ in sides]
        for method, side in zip(self.methods, sides, strict=True):
            method.fit(side)

    def notes(self) -> dict[str, str]:
        """Return each model's notes."""
        names = ["this model", *self.requires.checkpoints]
        found = [(name, m.notes()) for name, m in zip(names, self.methods, strict=True)]
        return {f"{what} of {name}": note for name, notes in found for what, note in notes.items()}

    def transform_query(self, queries: ExampleBlock) -> list[Any]:
        """Return what each model's method makes of the queries."""
        return [m.transform_query(b) for m, b in zip(self.methods, _models(queries), strict=True)]

    def score(self, queries: list[Any], train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        parts = zip(self.weights, self.methods, queries, _models(train), strict=True)
        return torch.stack([w * m.score(q, b) for w, m, q, b in parts]).sum(0)

    def contributions(self, queries: list[Any], train: ExampleBlock) -> Tensor | None:
        """Return what each timestep adds, ``[Q, n, T]``, if the method can say."""
        total: Tensor | None = None
        parts = zip(self.weights, self.methods, queries, _models(train), strict=True)
        for weight, method, asked, block in parts:
            found = method.contributions(asked, block)
            if found is None:
                return None
            total = weight * found if total is None else total + weight * found
        return total

    def group_contributions(
        self, queries: list[Any], train: ExampleBlock, layout: Layout
    ) -> Tensor | None:
        """Return what each group of layers adds, ``[Q, n, T, G]``, if the method can say."""
        parts = zip(self.weights, self.methods, queries, _models(train), strict=True)
        found = [(w, m.group_contributions(asked, b, layout)) for w, m, asked, b in parts]
        each = [weight * part for weight, part in found if part is not None]
        return torch.stack(each).sum(0) if len(each) == len(found) else None


class TracIn(OverCheckpoints):
    """Inner products of gradients at several checkpoints of one training (TracInCP).

    ``I(q, i) = Σ_c η_c ⟨g_c(q), g_c(i)⟩`` (Pruthi et al. 2020, arXiv 2002.08484)

    Args:
        checkpoints: as :class:`OverCheckpoints`, as are the weights η_c.
        weights: learning rates.
    """

    name = "tracin"

    def __init__(
        self, checkpoints: Sequence[str] = (), weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(GradDot(), checkpoints, weights)


class GAS(OverCheckpoints):
    """Cosines of gradients at several checkpoints: gradient aggregated similarity.

    ``I(q, i) = Σ_c w_c cos(g_c(q), g_c(i))`` (Hammoudeh & Lowd 2022, arXiv 2201.10055)

    Args:
        checkpoints: as :class:`OverCheckpoints`.
        weights: w_c.
    """

    name = "gas"

    def __init__(
        self, checkpoints: Sequence[str] = (), weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(GradCos(), checkpoints, weights)


class TRAKEnsemble(OverCheckpoints):
    """TRAK averaged over models that were trained alike, as its authors do (arXiv 2303.14186).

    Args:
        checkpoints: as :class:`OverCheckpoints`.
        alpha: as :class:`TRAK`, as are the others.
        rank: of the curvature.
        memory: bytes that fitting may take, for each model.
        passes: over each store.
    """

    name = "trak_ensemble"

    def __init__(
        self,
        checkpoints: Sequence[str] = (),
        alpha: float = 0.1,
        rank: int | None = None,
        memory: int = 1 << 30,
        passes: int = 2,
    ) -> None:
        super().__init__(TRAK(alpha, rank, memory, passes), checkpoints)


class DTRAKEnsemble(OverCheckpoints):
    """D-TRAK averaged over models that were trained alike (Zheng et al. 2024, arXiv 2311.00500).

    Args:
        checkpoints: as :class:`OverCheckpoints`.
        alpha: as :class:`DTRAK`, as are the others.
        rank: of the curvature.
        memory: bytes that fitting may take, for each model.
        passes: over each store.
    """

    name = "d_trak_ensemble"

    def __init__(
        self,
        checkpoints: Sequence[str] = (),
        alpha: float = 0.1,
        rank: int | None = None,
        memory: int = 1 << 30,
        passes: int = 2,
    ) -> None:
        super().__init__(DTRAK(alpha, rank, memory, passes), checkpoints)


def _models(block: ExampleBlock) -> list[ExampleBlock]:
    return [block, *block.checkpoints]
