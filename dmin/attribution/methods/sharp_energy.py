"""Spectral energy for ranking and for foretelling at once: the two want different shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.methods.spectral import SpectralEnergy
from dmin.runtime.errors import DminError
from dmin.store import Layout


class PreparedQuery(NamedTuple):
    """What is made of queries: preconditioned vectors, and how long their gradients are."""

    vectors: Tensor  # [Q, T, D·G·k]
    lengths: Tensor  # tanh z_t(q), [Q, T]


class SharpEnergy(SpectralEnergy):
    """Spectral energy at a given effective dimension, raised to a power; lengths may count as well.

    ``I(q, i) = ( Σ_t w_t² ⟨(1 + C_t/λ_t)^{−p} ĝ_t(q), ĝ_t(i)⟩² · exp(κ tanh z_t(q) · z_t(i)) )^s``

    with ``z_t = (log ‖g_t‖ − mean) / std`` over training examples, at most 3 either way. Three
    things that were found apart, on queries that settings are tuned by (experiments/sharp_energy):

    - The damping decides how examples rank. λ_t is such that each C_t keeps the same effective
      dimension, whatever its eigenvalues are, and this carries over between models.
    - s foretells retraining without any change to a ranking. LDS adds scores over half of the
      training set, so it matters how far the largest of them tower above the rest.
    - κ > 0 asks for gradients that are as long, or as short, as the query's, beside those of its
      direction: a source is often louder or quieter than the rest. It depends on the query; a
      power of the example's own norm would not, and helps where a source is loud only.

    Scores are not negative, and no inner product: found by exact search only.

    Args:
        alpha: as :class:`~dmin.attribution.methods.spectral.Spectral`, as are p and the weights.
        p: the power of the curvature.
        weights: w_t.
        lengths: κ.
        sharpness: s.
        rank: of the curvature.
        memory: bytes that fitting may take.
        passes: over the store.
        effective: dimension of each timestep's curvature, or None where α is given.

    Raises:
        DminError: a value is out of range.
    """

    name = "sharp_energy"

    def __init__(
        self,
        alpha: float | None = None,
        p: float = 2.0,
        weights: Sequence[float] | None = None,
        lengths: float = 0.0,
        sharpness: float = 2.0,
        rank: int | None = None,
        memory: int = 1 << 30,
        passes: int = 2,
        effective: float | None = 8.0,
    ) -> None:
        super().__init__(alpha, p, weights, rank, memory, passes, effective)
        if not 0 <= lengths < math.inf or not 0 < sharpness < math.inf:
            raise DminError(
                f"method.lengths={lengths}, method.sharpness={sharpness}: give a finite weight of "
                f"the lengths (0 leaves them out), and a positive power of the score."
            )
        self.lengths, self.sharpness = lengths, sharpness

    def fit(self, train: FeatureSet) -> None:
        """Fit the curvature of each timestep, and find how long gradients are."""
        super().fit(train)
        norms = torch.from_numpy(train.store.norms("loss"))
        logs = _log_lengths(norms)
        self._mean, self._spread = logs.mean(0), logs.std(0, correction=0).clamp(min=1e-6)  # [T]

    def transform_query(self, queries: ExampleBlock) -> PreparedQuery:  # type: ignore[override]
        """Return preconditioned unit queries, and how long their gradients are."""
        return PreparedQuery(super().transform_query(queries), self._standardised(queries).tanh())

    def score(self, queries: PreparedQuery, train: ExampleBlock) -> Tensor:  # type: ignore[override]
        """Return ``[Q, n]``, none negative."""
        return self._energy(queries, train).sum(2) ** self.sharpness

    def contributions(  # type: ignore[override]
        self, queries: PreparedQuery, train: ExampleBlock
    ) -> Tensor:
        """Return each timestep's share of the score, by its share of the energy, ``[Q, n, T]``."""
        energy = self._energy(queries, train)
        total = energy.sum(2, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)
        return energy / total * total**self.sharpness

    def group_contributions(  # type: ignore[override]
        self, queries: PreparedQuery, train: ExampleBlock, layout: Layout
    ) -> Tensor:
        """Return each group's share of each timestep's share, ``[Q, n, T, G]``."""
        parts = super().group_contributions(queries.vectors, train, layout)
        parts = parts * self._factor(queries, train)[..., None]
        total = parts.sum((2, 3), keepdim=True).clamp(min=torch.finfo(parts.dtype).tiny)
        return parts / total * total**self.sharpness

    def _energy(self, queries: PreparedQuery, train: ExampleBlock) -> Tensor:
        energy = super().contributions(queries.vectors, train)
        return energy * self._factor(queries, train) if self.lengths else energy

    def _factor(self, queries: PreparedQuery, train: ExampleBlock) -> Tensor:
        """Return ``exp(κ tanh z(q) · z(i))``, ``[Q, n, T]``."""
        z = self._standardised(train)
        return torch.exp(self.lengths * queries.lengths[:, None] * z[None])

    def _standardised(self, block: ExampleBlock) -> Tensor:
        """Return z, ``[n, T]``."""
        z = (_log_lengths(block.norms["loss"]) - self._mean) / self._spread
        return z.clamp(-3, 3)


def _log_lengths(norms: Tensor) -> Tensor:
    """Return the log of gradients' lengths, ``[n, T]``, from norms ``[n, D, T, G]``."""
    lengths = norms.square().sum(-1).sqrt().mean(1)  # over draws
    return lengths.clamp(min=torch.finfo(torch.float32).tiny).log()
