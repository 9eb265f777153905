"""Scores without what an example adds to every query alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.method import InnerProduct, Method
from dmin.runtime.sampling import evenly
from dmin.store import Layout


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
        self.name = f"{method.name}, popularity corrected"
        self.requires = method.requires

    def fit(self, train: FeatureSet) -> None:
        """Fit the method, and prepare the references as its queries."""
        self.method.fit(train)
        rows = evenly(len(train), self.references, ends=True)
        self._popular = self.method.transform_query(train.block(rows, self.requires))

    def notes(self) -> dict[str, str]:
        """Return the method's."""
        return self.method.notes()

    def transform_query(self, queries: ExampleBlock) -> Any:
        """Return the queries as the method wants them."""
        return self.method.transform_query(queries)

    def score(self, queries: Any, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        popularity = self.method.score(self._popular, train).mean(0)
        return self.method.score(queries, train) - popularity

    def contributions(self, queries: Any, train: ExampleBlock) -> Tensor | None:
        """Return what each timestep adds, ``[Q, n, T]``, if the method can say."""
        parts = self.method.contributions(queries, train)
        popular = self.method.contributions(self._popular, train)
        return None if parts is None or popular is None else parts - popular.mean(0)

    def group_contributions(
        self, queries: Any, train: ExampleBlock, layout: Layout
    ) -> Tensor | None:
        """Return what each group of layers adds, ``[Q, n, T, G]``, if the method can say."""
        parts = self.method.group_contributions(queries, train, layout)
        popular = self.method.group_contributions(self._popular, train, layout)
        return None if parts is None or popular is None else parts - popular.mean(0)

    def linear(self, queries: Any, layout: Layout) -> InnerProduct | None:
        """Return the queries less the references' mean: still one inner product."""
        asked = self.method.linear(queries, layout)
        popular = self.method.linear(self._popular, layout)
        if asked is None or popular is None:
            return None
        return replace(asked, queries=asked.queries - popular.queries.mean(0))
