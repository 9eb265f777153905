"""Spectral energy with an exponent, for ranking as well as for predicting retraining."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.methods.spectral import SpectralFamily
from dmin.runtime.errors import DminError


class PreparedQuery(NamedTuple):
    """Prepared queries: preconditioned vectors, and the norms of their gradients."""

    product: InnerProduct
    lengths: Tensor  # tanh z_t(q), [Q, T]


@dataclass(eq=False, repr=False)
class SharpEnergy(SpectralFamily):
    """Squares of the spectral family at each timestep, summed and raised to a power.

    ``I(q, i) = ( Σ_t w_t² ⟨(1 + C_t/λ_t)^{−p} ĝ_t(q), ĝ_t(i)⟩² · exp(κ tanh z_t(q) · z_t(i)) )^s``

    with ``z_t = (log ‖g_t‖ − mean) / std`` over training examples, at most 3 either way.

    With κ = 0 and s = 1 it is `spectral_energy`, magnitude without sign: DAS's
    square (arXiv 2410.18639) without its second readout, errors and leverages. A
    few strong examples outweigh many weak ones, as they do in retraining. Three effects were found
    on tuning queries (experiments/sharp_energy):

    - The damping determines the ranking. λ_t gives each C_t the same effective
      dimension, for any spectrum, which transfers between models.
    - s improves the prediction of retraining without changing a ranking. LDS sums scores over half
    of the
      training set, so it depends on how much larger than the rest the largest ones are.
    - κ > 0 favours gradients with norms similar to the query's, in addition to its direction: a
    source
      often has larger or smaller norms than the rest. A power of the example's own norm
      would not depend on the query, and only helps if a source has large norms.

    Scores are not negative, and not inner products: only exact search finds them.

    Args:
        alpha: as :class:`SpectralFamily`, as are p and the weights.
        p: the power of the curvature.
        weights: w_t.
        length_weight: κ.
        exponent: s.
        rank: of the curvature.
        memory: bytes that fitting may take.
        passes: over the store.
        effective: dimension of each timestep's curvature, or None where α is given.
        name: in tables and files.

    Raises:
        DminError: a value is out of range.
    """

    alpha: float | None = None
    p: float = 2.0
    length_weight: float = 0.0
    exponent: float = 2.0
    _: KW_ONLY
    effective: float | None = 8.0
    name: str = "sharp_energy"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        if not 0 <= self.length_weight < math.inf or not 0 < self.exponent < math.inf:
            raise DminError(
                f"method.length_weight={self.length_weight}, method.exponent={self.exponent}: give "
                f"a finite weight of the lengths (0 leaves them out), and a positive power of the "
                f"score."
            )

    def fit(self, train: FeatureSet) -> None:
        """Fit the curvature of each timestep, and the statistics of gradient norms."""
        super().fit(train)
        logs = _log_lengths(torch.from_numpy(train.store.norms("loss")))
        self._mean, self._spread = logs.mean(0), logs.std(0, correction=0).clamp(min=1e-6)  # [T]

    def transform_query(self, queries: ExampleBlock) -> PreparedQuery:
        """Return preconditioned unit queries, and the norms of their gradients."""
        return PreparedQuery(self.preconditioned(queries), self._standardised(queries).tanh())

    def score(self, queries: PreparedQuery, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``, none negative."""
        energy = queries.product.timesteps(train).square()
        if self.length_weight:
            energy = energy * self._factor(queries, train)
        return energy.sum(2) ** self.exponent

    def contributions(self, queries: PreparedQuery, train: ExampleBlock) -> Tensor:
        """Return the shares of groups and timesteps, by those of the energy, ``[Q, n, T, G]``.

        Of a square ``u²`` of ``u = Σ_g u_g`` a group has ``u_g · u``.
        """
        parts = queries.product.contributions(train)
        energy = parts * parts.sum(3, keepdim=True) * self._factor(queries, train)[..., None]
        total = energy.sum((2, 3), keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)
        return energy / total * total**self.exponent

    def _factor(self, queries: PreparedQuery, train: ExampleBlock) -> Tensor:
        """Return ``exp(κ tanh z(q) · z(i))``, ``[Q, n, T]``."""
        z = self._standardised(train)
        return torch.exp(self.length_weight * queries.lengths[:, None] * z[None])

    def _standardised(self, block: ExampleBlock) -> Tensor:
        """Return z, ``[n, T]``."""
        z = (_log_lengths(block.norms["loss"]) - self._mean) / self._spread
        return z.clamp(-3, 3)


def _log_lengths(norms: Tensor) -> Tensor:
    """Return the log of gradients' lengths, ``[n, T]``, from norms ``[n, D, T, G]``."""
    lengths = norms.square().sum(-1).sqrt().mean(1)  # over draws
    return lengths.clamp(min=torch.finfo(torch.float32).tiny).log()
