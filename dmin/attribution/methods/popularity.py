"""Baselines that never look at the query."""

from __future__ import annotations

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.method import Method
from dmin.attribution.methods.dmin import DMin


class Popularity(DMin):
    """How close an example is to all training examples: the same score for every query.

    ``I(q, i) = (1/n) Σ_j Σ_t ⟨ĝ_t(j), ĝ_t(i)⟩``

    What a method's ranking has in common with this one owes nothing to the question.
    """

    name = "popularity"

    def __init__(self) -> None:
        super().__init__()

    def fit(self, train: FeatureSet) -> None:
        """Find the mean of the unit gradients."""
        total: Tensor | None = None
        for block in train.blocks(self.requires):
            part = DMin.transform_query(self, block).double().sum(0)
            total = part if total is None else total + part
        assert total is not None  # a store has examples
        self._mean = (total / len(train)).float()

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return the mean once for each query, ``[Q, T, D·G·k]``."""
        return torch.stack([self._mean] * len(queries.ids))


class TrainingLoss(Method):
    """How badly the model does on an example: the same score for every query.

    ``I(q, i) = Σ_t L_t(i) / mean_j L_t(j)``, averaged over noise draws

    The squared error that `das` multiplies its kernel by, without the kernel. What is rare is
    learned badly, so this alone finds most of a rare source: a method that is asked for it must
    do better, and must not name the same examples to everybody.
    """

    name = "training_loss"
    requires = Requires(readouts=())

    def fit(self, train: FeatureSet) -> None:
        """Read the losses of all examples."""
        losses = torch.from_numpy(train.store.losses()).double()
        relative = losses / losses.mean(0).clamp(min=torch.finfo(torch.float32).tiny)
        self._scores = dict(zip(train.store.ids, relative.mean(1).sum(1).float(), strict=True))

    def score(self, queries: ExampleBlock, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``, all rows the same."""
        found = torch.stack([self._scores[id] for id in train.ids])
        return found.expand(len(queries.ids), -1)
