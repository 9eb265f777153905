"""The baseline that never looks at the query."""

from __future__ import annotations

import torch
from torch import Tensor

from dmin.attribution.base import ExampleBlock, Side
from dmin.attribution.dmin import DMin


class Popularity(DMin):
    """How close an example is to all training examples: the same score for every query.

    ``I(q, i) = (1/n) Σ_j Σ_t ⟨ĝ_t(j), ĝ_t(i)⟩``

    What a method's ranking has in common with this one owes nothing to the question.
    """

    name = "popularity"

    def __init__(self) -> None:
        super().__init__()

    def fit(self, train: Side) -> None:
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
