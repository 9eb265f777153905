"""The spectral family: DMin's cosines seen through a power of the curvature."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from dmin.attribution.curvature.damped import DampedCurvatureMethod, checked_damping
from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.methods.dmin import DMin
from dmin.attribution.rows import unit_rows
from dmin.runtime.errors import DminError
from dmin.runtime.sampling import evenly
from dmin.store import Layout


class Spectral(DampedCurvatureMethod, DMin):
    """Unit gradients, each timestep preconditioned by a power of its own damped curvature.

    ``I(q, i) = Σ_t w_t ⟨(1 + C_t/λ_t)^{−p} ĝ_t(q), ĝ_t(i)⟩ ,   λ_t = α · mean eigenvalue of C_t``

    with ``C_t = mean_i ĝ_t(i) ĝ_t(i)ᵀ``, draws of noise pooled. p = 0 or α → ∞ is DMin; p = 1 is
    TRAK of one timestep after DMin's normalisation; between them lies what damps the directions
    that all examples share. Only the query changes, so any index of DMin's rows serves as it is.

    Args:
        alpha: as :class:`DampedCurvatureMethod`, as are all but the next two.
        p: the power.
        weights: w_t, one a timestep, or None for all 1.
        rank: of the curvature.
        memory: bytes that fitting may take.
        passes: over the store.
        effective: dimension, instead of α.

    Raises:
        DminError: as :class:`DampedCurvatureMethod`, or p is not a number.
    """

    name = "spectral"

    def __init__(
        self,
        alpha: float | None = 0.03,
        p: float = 1.0,
        weights: Sequence[float] | None = None,
        rank: int | None = None,
        memory: int = 1 << 30,
        passes: int = 2,
        effective: float | None = None,
    ) -> None:
        DampedCurvatureMethod.__init__(self, alpha, rank, memory, passes, effective)
        DMin.__init__(self, weights)
        self.p = _checked_power(p)

    def at(self, alpha: float, p: float) -> Self:
        """Return the member of the family at another point, with the curvature as fitted."""
        other = copy.copy(self)
        other.alpha, other.effective = checked_damping(alpha, None)
        other.p = _checked_power(p)
        return other

    def fit(self, train: FeatureSet) -> None:
        """Fit the curvature of each timestep."""
        draws, steps, groups, dim = train.store.layout.row_shape
        self.fit_to(
            train,
            lambda block: unit_rows(block).flatten(0, 1),
            (len(train) * draws, steps, groups * dim),
            "unit",
        )

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return weighted, preconditioned unit queries ``[Q, T, D·G·k]``."""
        return self._weighted(self._preconditioned(queries))

    def _preconditioned(self, queries: ExampleBlock) -> Tensor:
        rows = self._unit(queries.features["loss"])
        by_draw = rows.unflatten(2, (-1, self.curvature.vectors.shape[2])).transpose(1, 2)
        scale = (self.damping**self.p).to(rows)[:, None]
        found = self.power(by_draw.flatten(0, 1), self.p, queries.ids) * scale
        return found.view(by_draw.shape).transpose(1, 2).flatten(2)


class SpectralEnergy(Spectral):
    """The spectral family's share of each timestep, squared: strength without direction.

    ``I(q, i) = Σ_t w_t² ⟨(1 + C_t/λ_t)^{−p} ĝ_t(q), ĝ_t(i)⟩²``

    DAS's square (arXiv 2410.18639) without its second readout, errors and leverages: few strong
    examples outweigh the sum of many weak ones, as they do in retraining. No longer one vector a
    query, so it is found by exact search only. Settings are those of :class:`Spectral`.
    """

    name = "spectral_energy"

    def __init__(
        self,
        alpha: float | None = 1.0,
        p: float = 1.0,
        weights: Sequence[float] | None = None,
        rank: int | None = None,
        memory: int = 1 << 30,
        passes: int = 2,
        effective: float | None = None,
    ) -> None:
        super().__init__(alpha, p, weights, rank, memory, passes, effective)

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``, none negative."""
        return self.contributions(queries, train).sum(2)

    def contributions(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return the square at each timestep, ``[Q, n, T]``."""
        return super().contributions(queries, train).square()

    def group_contributions(self, queries: Tensor, train: ExampleBlock, layout: Layout) -> Tensor:
        """Return ``u_g · u`` for the square of ``u = Σ_g u_g``, ``[Q, n, T, G]``."""
        both, shape = (queries, self._unit(train.features["loss"])), layout.row_shape
        q, rows = (x.unflatten(2, (shape[0], *shape[2:])) for x in both)
        parts = torch.einsum("qtdgk,ntdgk->qntg", q, rows)
        return parts * parts.sum(3, keepdim=True)

    def linear(self, queries: Tensor, layout: Layout) -> None:  # type: ignore[override]
        """Return None: squares are no inner product, whatever the parent's scores are."""
        return None


class ZSum(Spectral):
    """DMin and a member of the spectral family, each in units of its own spread, added up.

    ``I(q, i) = I_dmin(q, i) / s_dmin(q) + I_spectral(q, i) / s_spectral(q)``

    with s the standard deviation over training examples (of at most ``sample``, evenly spaced).
    This ranks as the sum of z-scores does, and is still one vector a query.

    Args:
        alpha: as :class:`Spectral`, as are all but the last.
        p: the power.
        weights: w_t.
        rank: of the curvature.
        memory: bytes that fitting may take.
        passes: over the store.
        effective: dimension, instead of α.
        sample: training examples that s is estimated from; their rows are kept in memory.

    Raises:
        DminError: as :class:`Spectral`, or a sample of fewer than two.
    """

    name = "z_sum"

    def __init__(
        self,
        alpha: float | None = 0.03,
        p: float = 1.0,
        weights: Sequence[float] | None = None,
        rank: int | None = None,
        memory: int = 1 << 30,
        passes: int = 2,
        effective: float | None = None,
        sample: int = 1024,
    ) -> None:
        super().__init__(alpha, p, weights, rank, memory, passes, effective)
        if sample < 2:
            raise DminError(f"method.sample={sample}: a spread needs two examples or more.")
        self.sample = sample

    def fit(self, train: FeatureSet) -> None:
        """Fit the curvature, and keep a sample of the training rows."""
        super().fit(train)
        self._sample = train.block(evenly(len(train), self.sample), self.requires)

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return the sum of both queries, each divided by its spread, ``[Q, T, D·G·k]``."""
        plain, other = DMin.transform_query(self, queries), super().transform_query(queries)
        return self._in_spreads(plain) + self._in_spreads(other)

    def _in_spreads(self, queries: Tensor) -> Tensor:
        spread = self.score(queries, self._sample).std(1, correction=0)
        return queries / spread.clamp(min=1e-12)[:, None, None]


def _checked_power(p: float) -> float:
    if not math.isfinite(p):
        raise DminError(f"method.p={p}: give a finite power; 0 is DMin, 1 the inverse.")
    return float(p)
