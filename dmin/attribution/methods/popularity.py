"""Popularity: what an example adds to every query alike, as a baseline, and taken away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.inner_product import InnerProduct, scaled_rows
from dmin.attribution.method import InnerProductMethod, Method
from dmin.runtime.sampling import evenly


class Popularity(InnerProductMethod):
    """How close an example is to all training examples: the same score for every query.

    ``I(q, i) = (1/n) Σ_j Σ_t ⟨ĝ_t(j), ĝ_t(i)⟩``

    What a method's ranking has in common with this one owes nothing to the question.
    """

    name = "popularity"

    def fit(self, train: FeatureSet) -> None:
        """Find the mean of the unit gradients."""
        total = torch.zeros(train.store.layout.row_shape, dtype=torch.float64)
        for block in train.blocks(self.requires):
            total += train.counted(scaled_rows(block, "unit").double(), block).sum(0)
        self._mean = (total / train.total / len(total)).float()  # [D, T, G, k], over draws as well

    def transform_query(self, queries: ExampleBlock) -> InnerProduct:
        """Return the mean once for each query."""
        return InnerProduct(self._mean.expand(len(queries.ids), -1, -1, -1, -1), "unit")


class PopularityCorrected(Method):
    """Another method's score, less the example's popularity: some are close to everything.

    ``I'(q, i) = I(q, i) − mean_r I(r, i)``, r from training examples evenly spaced in the store

    (the centring that takes hubs out of nearest neighbours: Suzuki et al., EMNLP 2013).

    Args:
        method: whose scores.
        references: number of r.
    """

    def __init__(self, method: Method, references: int = 256) -> None:
        self.method = method
        self.references = references
        self.name: str = f"{method.name}, popularity corrected"
        self.requires = method.requires

    def check(self) -> None:
        """Check the method."""
        self.method.check()

    def fit(self, train: FeatureSet) -> None:
        """Fit the method, and prepare the references as its queries."""
        self.method.fit(train)
        rows = evenly(len(train), self.references, ends=True)
        self._popular = self.method.transform_query(train.block(rows, self.requires))

    def notes(self) -> dict[str, str]:
        """Return the method's."""
        return self.method.notes()

    def transform_query(self, queries: ExampleBlock) -> Any:
        """Return the method's queries, of inner products less the references' mean."""
        found, popular = self.method.transform_query(queries), self._popular
        if isinstance(found, InnerProduct):  # less one inner product it is still one
            return replace(found, queries=found.queries - popular.queries.mean(0))
        return found

    def score(self, queries: Any, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        if isinstance(queries, InnerProduct):
            return queries.scores(train)
        popularity = self.method.score(self._popular, train).mean(0)
        return self.method.score(queries, train) - popularity

    def contributions(self, queries: Any, train: ExampleBlock) -> Tensor | None:
        """Return what groups add at timesteps, ``[Q, n, T, G]``, if the method can say."""
        if isinstance(queries, InnerProduct):
            return queries.contributions(train)
        parts = self.method.contributions(queries, train)
        popular = self.method.contributions(self._popular, train)
        return None if parts is None or popular is None else parts - popular.mean(0)
