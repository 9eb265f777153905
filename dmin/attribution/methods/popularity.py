"""Popularity: an example's mean score over all queries, as a baseline or subtracted."""

import torch

from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.inner_product import InnerProduct, scaled_rows
from dmin.attribution.method import InnerProductMethod, Method
from dmin.attribution.methods.pooled import Pooled
from dmin.runtime.sampling import evenly


class Popularity(InnerProductMethod):
    """How close an example is to all training examples: the same score for every query.

    ``I(q, i) = (1/n) Σ_j Σ_t ⟨ĝ_t(j), ĝ_t(i)⟩``

    A ranking that agrees with this one does not depend on the query.
    """

    name = "popularity"
    by_query = False

    def fit(self, train: FeatureSet) -> None:
        """Find the mean of the unit gradients."""
        total = torch.zeros(train.store.layout.row_shape, dtype=torch.float64)
        for block in train.blocks(self.requires):
            total += train.counted(scaled_rows(block, "unit").double(), block).sum(0)
        self._mean = (total / train.total / len(total)).float()  # [D, T, G, k], over draws as well

    def transform_query(self, queries: ExampleBlock) -> InnerProduct:
        """Return the mean once for each query."""
        return InnerProduct(self._mean.expand(len(queries.ids), -1, -1, -1, -1), "unit")


class PopularityCorrected(Pooled):
    """Another method's score minus the example's popularity, since some are close to everything.

    ``I'(q, i) = I(q, i) − mean_r I(r, i)``, r from training examples evenly spaced in the store

    (centring, which reduces hubs among nearest neighbours: Suzuki et al., EMNLP 2013).

    Args:
        method: whose scores.
        references: number of r.
    """

    def __init__(self, method: Method, references: int = 256) -> None:
        super().__init__(method)
        self.references, self.name = references, f"{method.name}, popularity corrected"

    def others(self, train: FeatureSet) -> list[ExampleBlock]:
        """Return the references."""
        return [train.block(evenly(len(train), self.references, ends=True), self.requires)]
