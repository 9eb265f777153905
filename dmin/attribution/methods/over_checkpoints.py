"""Scores averaged over several models: checkpoints of one training, or trainings of one recipe."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmin.attribution.curvature.curvature import MEMORY, PASSES
from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.method import Method, Requires
from dmin.attribution.methods.combination import Combination
from dmin.attribution.methods.trak import TRAK
from dmin.runtime.errors import DminError


class OverCheckpoints(Combination):
    """Another method's score, averaged over models, each with its own stores and fit.

    ``I(q, i) = Σ_c w_c I_c(q, i) / Σ_c w_c``, c the model itself and the further ones

    Of :class:`GradDot`, with the learning rates for weights, it is TracInCP, ``Σ_c η_c ⟨g_c(q),
    g_c(i)⟩`` (Pruthi et al. 2020, arXiv 2002.08484); of :class:`GradCos` it is GAS, gradient
    aggregated similarity (Hammoudeh & Lowd 2022, arXiv 2201.10055).

    Args:
        method: whose scores.
        checkpoints: names of the further models: on the command line, their paths.
        weights: w_c, beginning with the model itself; None for equal weights. TracIn uses the
            learning
            rate at each checkpoint.
        name: in tables and files; None for the method's own.

    Raises:
        DminError: another number of weights than of models.
    """

    name: str = "over_checkpoints"

    def __init__(
        self,
        method: Method,
        checkpoints: Sequence[str] = (),
        weights: Sequence[float] | None = None,
        name: str | None = None,
    ) -> None:
        names = tuple(str(path) for path in checkpoints)
        if weights is not None and len(weights) != 1 + len(names):
            raise DminError(
                f"method.weights has {len(weights)} numbers for {1 + len(names)} models; give one "
                f"for the model itself and one for each of method.checkpoints."
            )
        self.method = method
        self.name = name or self.name
        self.requires: Requires = replace(method.requires, checkpoints=names)
        self.shares: Tensor = torch.tensor(
            list(weights or [1.0] * (1 + len(names))), dtype=torch.float64
        )

    @property
    def titles(self) -> list[str]:
        """The models' names."""
        return ["this model", *self.requires.checkpoints]

    def check(self) -> None:
        """Refuse to average over a single model."""
        if not self.requires.checkpoints:
            raise DminError(
                f"method={self.name} averages over several models, and only one is given. Give "
                f"the others: method.checkpoints=[path, …], each collected with the same settings "
                f"(dmin collect -m model.path=a,b,c), or set "
                f"method={self.method.name}."
            )

    def fit(self, train: FeatureSet) -> None:
        """Fit a copy of the method for each model; errors as of :meth:`check`."""
        self.check()
        sides = [train, *(train.checkpoints[name] for name in self.requires.checkpoints)]
        self.methods = [copy.deepcopy(self.method) for _ in sides]
        for method, side in zip(self.methods, sides, strict=True):
            method.fit(side)

    def weights(self, queries: list[Any]) -> list[Tensor]:
        """Return each model's share of the mean."""
        return list((self.shares / self.shares.sum()).float()[:, None])

    def blocks(self, block: ExampleBlock) -> list[ExampleBlock]:
        """Return the examples under each model."""
        return [block, *block.checkpoints]


class TRAKEnsemble(OverCheckpoints):
    """TRAK averaged over models that were trained alike, as its authors do (arXiv 2303.14186).

    D-TRAK likewise, by its readout (Zheng et al. 2024, arXiv 2311.00500).

    Args:
        checkpoints: as :class:`OverCheckpoints`.
        alpha: as :class:`TRAK`, as are the others but the last.
        rank: of the curvature.
        memory: bytes that fitting may take, for each model.
        passes: over each store.
        readout: the function of the output that is differentiated.
        name: as :class:`OverCheckpoints`.
    """

    name = "trak_ensemble"

    def __init__(
        self,
        checkpoints: Sequence[str] = (),
        alpha: float = 0.1,
        rank: int | None = None,
        memory: int = MEMORY,
        passes: int = PASSES,
        readout: str = "loss",
        name: str | None = None,
    ) -> None:
        method = TRAK(alpha, rank=rank, memory=memory, passes=passes, readout=readout)
        super().__init__(method, checkpoints, name=name)
