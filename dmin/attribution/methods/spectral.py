"""The spectral family: DMin's cosines after a power of the curvature is applied to the query."""

import copy
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Self

from torch import Tensor

from dmin.attribution.curvature.damped import DampedCurvatureMethod, require_damping
from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.inner_product import InnerProduct, scaled_rows
from dmin.attribution.method import InnerProductMethod
from dmin.attribution.methods.dmin import DMin, weighted, weights_of
from dmin.runtime.errors import DminError
from dmin.runtime.sampling import evenly


@dataclass(eq=False, repr=False)
class SpectralFamily(DampedCurvatureMethod):
    """Unit queries, preconditioned at each timestep by a power of its damped curvature.

    ``(1 + C_t/λ_t)^{−p} ĝ_t(q)``, with ``C_t = mean_i ĝ_t(i) ĝ_t(i)ᵀ``, draws of noise pooled

    Args:
        alpha: as :class:`DampedCurvatureMethod`, as are all but the next two.
        p: the power.
        weights: w_t, one for each timestep, or None for 1.
        rank: of the curvature.
        memory: bytes that fitting may take.
        passes: over the store.
        effective: dimension, instead of α.

    Raises:
        DminError: as :class:`DampedCurvatureMethod`, or p is not a number.
    """

    alpha: float | None = 0.03
    p: float = 1.0
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Refuse a p that is not a number."""
        super().__post_init__()
        _require_power(self.p)

    def at(self, alpha: float, p: float) -> Self:
        """Return the method with another power and damping, with the curvature as fitted."""
        other = copy.copy(self)
        require_damping(alpha, None)
        _require_power(p)
        other.alpha, other.effective, other.p = alpha, None, p
        return other

    def fit(self, train: FeatureSet) -> None:
        """Fit the curvature of each timestep."""
        draws, steps, groups, dim = train.store.layout.row_shape
        shape = len(train) * draws, steps, groups * dim
        self.fit_to(train, _unit_rows, shape, "unit")

    def preconditioned(self, queries: ExampleBlock) -> InnerProduct:
        """Return weighted, preconditioned unit queries; draws of noise are averaged."""
        rows = queries.features["loss"]
        scale = (self.damping**self.p).to(rows)[:, None]
        found = self.power(_unit_rows(queries), self.p, queries.ids) * scale
        vectors = weighted(found.view_as(rows), weights_of(self.weights))
        return InnerProduct(vectors / rows.shape[1], "unit")


class Spectral(SpectralFamily, InnerProductMethod):
    """Unit gradients, preconditioned at each timestep by a power of its damped curvature.

    ``I(q, i) = Σ_t w_t ⟨(1 + C_t/λ_t)^{−p} ĝ_t(q), ĝ_t(i)⟩ ,   λ_t = α · mean eigenvalue of C_t``

    with ``C_t = mean_i ĝ_t(i) ĝ_t(i)ᵀ``, draws of noise pooled. p = 0 or α → ∞ is DMin; p = 1 is
    TRAK of one timestep after DMin's normalisation; values in between damp the directions that
    all examples share. Only the query is transformed, so indices of DMin's rows can be used
    unchanged.

    Settings are those of :class:`SpectralFamily`.
    """

    name = "spectral"

    def transform_query(self, queries: ExampleBlock) -> InnerProduct:
        """Return weighted, preconditioned unit queries."""
        return self.preconditioned(queries)


@dataclass(eq=False, repr=False)
class ZSum(Spectral):
    """The sum of DMin and a spectral method, each divided by its standard deviation.

    ``I(q, i) = I_dmin(q, i) / s_dmin(q) + I_spectral(q, i) / s_spectral(q)``

    with s the standard deviation over training examples (of at most ``sample``, evenly spaced).
    This ranks like the sum of z-scores, and is still one vector for each query.

    Args:
        alpha: as :class:`SpectralFamily`, as are all but the last.
        p: the power.
        weights: w_t.
        rank: of the curvature.
        memory: bytes that fitting may take.
        passes: over the store.
        effective: dimension, instead of α.
        sample: training examples that s is estimated from; their rows are kept in memory.

    Raises:
        DminError: as :class:`SpectralFamily`, or a sample of fewer than two.
    """

    _: KW_ONLY
    sample: int = 1024
    name = "z_sum"

    def __post_init__(self) -> None:
        """Refuse a sample of fewer than two."""
        super().__post_init__()
        if self.sample < 2:
            raise DminError(f"method.sample={self.sample}: a spread needs two examples or more.")

    def fit(self, train: FeatureSet) -> None:
        """Fit the curvature, and keep a sample of the training rows."""
        super().fit(train)
        self._sample = train.block(evenly(len(train), self.sample), self.requires)

    def transform_query(self, queries: ExampleBlock) -> InnerProduct:
        """Return the sum of both queries, each divided by its spread."""
        plain, other = DMin(self.weights).transform_query(queries), self.preconditioned(queries)
        return replace(other, queries=self._in_spreads(plain) + self._in_spreads(other))

    def _in_spreads(self, queries: InnerProduct) -> Tensor:
        spread = queries.scores(self._sample).std(1, correction=0).clamp(min=1e-12)
        return queries.queries / spread[:, None, None, None, None]


def _unit_rows(block: ExampleBlock) -> Tensor:
    """Return unit gradients, with draws as separate rows, ``[n·D, T, G·k]``."""
    return scaled_rows(block, "unit").flatten(3).flatten(0, 1)


def _require_power(p: float) -> None:
    if not math.isfinite(p):
        raise DminError(f"method.p={p}: give a finite power; 0 is DMin, 1 the inverse.")
