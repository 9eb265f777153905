"""Spectral energy for ranking and for foretelling at once: the two want different shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dmin.attribution.base import ExampleBlock, Side
from dmin.attribution.spectral import SpectralEnergy
from dmin.errors import DminError
from dmin.store import Layout


class SharpEnergy(SpectralEnergy):
    """Spectral energy at much damping, with a part of the example's norm, raised to a power.

    ``I(q, i) = ( Σ_t w_t² [ n_t(i)^γ ⟨(1 + C_t/λ_t)^{−p} ĝ_t(q), ĝ_t(i)⟩ ]² )^s``

    with ``n_t(i) = ‖g_t(i)‖ / mean_j ‖g_t(j)‖``. Three things that were found apart:

    - α decides how examples rank. Much damping finds sources and copies; where scores are only
      squared, little of it foretells retraining best (LDS).
    - s foretells as well without any change to a ranking. LDS adds scores over half of the
      training set, so it matters how far the largest of them tower above the rest.
    - γ brings back some of the length that DMin takes away: 1 is the gradient itself, as in
      influence functions, 0 DMin's cosine. Examples of large gradient move the model further.

    The defaults were chosen on tune queries of one small world of digits
    (experiments/sharp_energy). Scores are not negative, and no inner product: found by exact
    search only.

    Args:
        alpha: as :class:`~dmin.attribution.spectral.Spectral`, as are p and the weights.
        p: the power of the curvature.
        weights: w_t.
        norms: γ.
        sharpness: s.
        rank: of the curvature.
        memory: bytes that fitting may take.
        passes: over the store.

    Raises:
        DminError: a value is out of range.
    """

    name = "sharp_energy"

    def __init__(
        self,
        alpha: float = 100.0,
        p: float = 2.0,
        weights: Sequence[float] | None = None,
        norms: float = 0.5,
        sharpness: float = 2.0,
        rank: int | None = None,
        memory: int = 1 << 30,
        passes: int = 2,
    ) -> None:
        super().__init__(alpha, p, weights, rank, memory, passes)
        if not math.isfinite(norms) or not 0 < sharpness < math.inf:
            raise DminError(
                f"method.norms={norms}, method.sharpness={sharpness}: give a finite power of the "
                f"norm (0 leaves it out), and a positive one of the score."
            )
        self.norms, self.sharpness = norms, sharpness

    def fit(self, train: Side) -> None:
        """Fit the curvature of each timestep, and find the mean norms."""
        super().fit(train)
        lengths = torch.from_numpy(train.store.norms("loss")).square().sum(-1).sqrt()
        mean = lengths.double().mean((0, 1))  # [T]
        self._mean_norm = torch.where(mean > 0, mean, 1).float()

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``, none negative."""
        return self._energy(queries, train).sum(2) ** self.sharpness

    def contributions(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return each timestep's share of the score, by its share of the energy, ``[Q, n, T]``."""
        energy = self._energy(queries, train)
        total = energy.sum(2, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)
        return energy / total * total**self.sharpness

    def group_contributions(self, queries: Tensor, train: ExampleBlock, layout: Layout) -> Tensor:
        """Return each group's share of each timestep's share, ``[Q, n, T, G]``."""
        parts = super().group_contributions(queries, train, layout)
        scale = self._lengths(train)[..., None]
        total = (parts.sum(3, keepdim=True) * scale).sum(2, keepdim=True)
        total = total.clamp(min=torch.finfo(total.dtype).tiny)
        return parts * scale / total * total**self.sharpness

    def _energy(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        return super().contributions(queries, train) * self._lengths(train)

    def _lengths(self, train: ExampleBlock) -> Tensor:
        lengths = train.norms["loss"].square().sum(-1).sqrt().mean(1)  # [n, T], over draws
        return (lengths / self._mean_norm) ** (2 * self.norms)
