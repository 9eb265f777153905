"""DMin: the sum over timesteps of cosines of compressed gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock
from dmin.attribution.inner_product import InnerProduct, Scale, scaled_rows
from dmin.attribution.method import InnerProductMethod
from dmin.runtime.errors import DminError


class DMin(InnerProductMethod):
    """DMin's score: per-timestep gradient cosines, summed.

    ``I(q, i) = Σ_t w_t ⟨ĝ_t(q), ĝ_t(i)⟩``, ĝ the unit gradient, averaged over noise draws

    (Lin, Lao & Zhao, arXiv 2412.08637). Sketches of unit gradients are re-normalised
    to unit length first, which the paper omits: it reduces the variance of a cosine ρ from
    ``(1 + ρ²)/k`` to ``(1 − ρ²)²/k`` (Li & Li, OPORP, arXiv
    2302.03505).

    Args:
        weights: w_t, one for each timestep, or None for 1.
        renormalise: False leaves the sketches unnormalised, as in the paper.
        keep_norms: gradients with their norms instead of unit gradients: the paper's row
            "w/o normalization", here named ``dmin_unnormalised``.
    """

    name: str = "dmin"

    def __init__(
        self,
        weights: Sequence[float] | None = None,
        renormalise: bool = True,
        keep_norms: bool = False,
    ) -> None:
        self.weights: Tensor | None = weights_of(weights)
        self.scale: Scale = "norm" if keep_norms else "unit" if renormalise else "none"
        if keep_norms:
            self.name = "dmin_unnormalised"

    def transform_query(self, queries: ExampleBlock) -> InnerProduct:
        """Return weighted rows of the queries; draws of noise are averaged."""
        rows = weighted(scaled_rows(queries, self.scale), self.weights)
        return InnerProduct(rows / rows.shape[1], self.scale)


def weights_of(weights: Sequence[float] | None) -> Tensor | None:
    """Return timestep weights as float32 ``[T]``; None stays None."""
    return None if weights is None else torch.tensor(list(weights)).float()


def weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Return rows ``[n, D, T, G, k]`` times the weights of their timesteps.

    Raises:
        DminError: the number of weights is not that of the timesteps.
    """
    if weights is None:
        return rows
    if len(weights) != rows.shape[2]:
        raise DminError(
            f"method.weights has {len(weights)} numbers for {rows.shape[2]} timesteps; "
            f"give one for each timestep, or null for equal weights."
        )
    return rows * weights[:, None, None]
