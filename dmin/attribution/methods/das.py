"""DAS: the influence on the model's output instead of its loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmin.attribution.curvature.damped import DampedCurvatureMethod
from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.inner_product import scaled_rows


@dataclass(eq=False, repr=False)
class DAS(DampedCurvatureMethod):
    """The squared change of the query's output if an example were left out.

    ``I(q, i) = Σ_t [ f̂_t(q)ᵀ (n C_t + nλ_t)^{−1} f̂_t(i) · e_t(i) / (1 − h_t(i)) ]²``

    with f̂ the unit gradient of the mean output, ``e_t(i)`` the example's error (root of its loss,
    over the mean at that timestep) and ``h_t(i) = f̂ᵀ(nC_t + nλ_t)^{−1} f̂`` its leverage: one
    Newton step of leave-one-out (Lin et al. 2025, "Diffusion Attribution Score", arXiv 2410.18639).
    Scores are not negative: they have no direction. Draws are averaged.

    Args:
        alpha: see :class:`DampedCurvatureMethod`, also for the others.
        leverage: divide by 1 − h.
        rank: of the curvature.
        memory: bytes that fitting may take.
        passes: over the store.
        effective: dimension, instead of α.

    Raises:
        DminError: as :class:`DampedCurvatureMethod`.
    """

    leverage: bool = True
    name = "das"
    requires = Requires(readouts=("mean_output",))

    def fit(self, train: FeatureSet) -> None:
        """Fit the curvature of each timestep, and read the errors of all examples."""
        draws, steps, groups, dim = train.store.layout.row_shape
        self._samples = train.total * draws
        self.fit_to(
            train,
            lambda block: self._rows(block).flatten(3).flatten(0, 1),
            (len(train) * draws, steps, groups * dim),
            "unit",
        )
        error = torch.from_numpy(train.store.losses()).clamp(min=0).sqrt()
        mean = train.counted(error, ExampleBlock(0, train.store.ids)).sum(0) / train.total
        mean = mean.clamp(min=torch.finfo(torch.float32).tiny)
        self._errors = dict(zip(train.store.ids, error / mean, strict=True))  # id -> [D, T]

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return preconditioned unit queries, ``[Q, D, T, G, k]``."""
        rows = self._rows(queries)
        found = self.power(rows.flatten(3).flatten(0, 1), 1.0, queries.ids)
        return found.view_as(rows) / self._samples

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        rows = self._rows(train)
        change = torch.einsum("qdtm,ndtm->qndt", queries.flatten(3), rows.flatten(3))
        return (change * self._scale(train, rows)).square().mean(2).sum(2)

    def contributions(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``u_g · u`` for the squared change ``u = Σ_g u_g``, ``[Q, n, T, G]``."""
        rows = self._rows(train)
        change = torch.einsum("qdtgk,ndtgk->qndtg", queries, rows)
        change = change * self._scale(train, rows)[..., None]
        return (change * change.sum(4, keepdim=True)).mean(2)

    def _scale(self, train: ExampleBlock, rows: Tensor) -> Tensor:
        """Return ``e / (1 − h)``, ``[n, D, T]``."""
        error = torch.stack([self._errors[id] for id in train.ids])
        if not self.leverage:
            return error
        by_draw = rows.flatten(3).flatten(0, 1)
        h = self.curvature.quadratic(by_draw, self.damping, 1.0) / self._samples
        return error / (1 - h.view(error.shape)).clamp(min=1e-6).to(error)

    def _rows(self, block: ExampleBlock) -> Tensor:
        return scaled_rows(block, "unit", self.requires.readouts[0])
