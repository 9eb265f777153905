"""DMin: the sum over timesteps of cosines of compressed gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock
from dmin.attribution.method import InnerProduct, Method, in_row_order
from dmin.runtime.errors import DminError
from dmin.store import Layout


class DMin(Method):
    """DMin's score: per-timestep gradient cosines, summed.

    ``I(q, i) = Σ_t w_t ⟨ĝ_t(q), ĝ_t(i)⟩``, ĝ the unit gradient, averaged over noise draws

    (Lin, Lao & Zhao, arXiv 2412.08637). Sketches of unit gradients are re-normalised
    to unit length first, which the paper omits: it brings the variance of a cosine ρ from
    ``(1 + ρ²)/k`` to ``(1 − ρ²)²/k`` (Li & Li, OPORP, arXiv
    2302.03505).

    Args:
        weights: w_t, one a timestep, or None for all 1.
        renormalise: False leaves the sketches as the paper has them.
    """

    name = "dmin"

    def __init__(self, weights: Sequence[float] | None = None, renormalise: bool = True) -> None:
        self.weights = None if weights is None else torch.tensor(list(weights)).float()
        self.renormalise = renormalise

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return weighted unit queries ``[Q, T, D·G·k]``."""
        return self._weighted(self._unit(queries.features["loss"]))

    def _weighted(self, unit: Tensor) -> Tensor:
        if self.weights is None:
            return unit
        if len(self.weights) != unit.shape[1]:
            raise DminError(
                f"method.weights has {len(self.weights)} numbers for {unit.shape[1]} timesteps; "
                f"give one a timestep, or null for equal ones."
            )
        return unit * self.weights[:, None]

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return one matrix product of all timesteps at once, ``[Q, n]``."""
        return queries.flatten(1) @ self._unit(train.features["loss"]).flatten(1).T

    def contributions(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return the weighted cosine at each timestep, ``[Q, n, T]``."""
        return torch.einsum("qtm,ntm->qnt", queries, self._unit(train.features["loss"]))

    def linear(self, queries: Tensor, layout: Layout) -> InnerProduct:
        """Return the queries in the store's order; see the base class."""
        return InnerProduct(in_row_order(queries, layout), "unit" if self.renormalise else "none")

    def _unit(self, features: Tensor) -> Tensor:
        """Return ``[n, T, D·G·k]``; divided by √D on both sides, so that draws are averaged."""
        rows = features.flatten(3)  # [n, D, T, G·k]
        if self.renormalise:
            rows = torch.nn.functional.normalize(rows, dim=-1)
        return (rows / rows.shape[1] ** 0.5).transpose(1, 2).flatten(2)
