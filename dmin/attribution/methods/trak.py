"""TRAK and its variants: gradients summed over timesteps, and a damped inverse."""

from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dmin.attribution.curvature.damped import DampedCurvatureMethod
from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.inner_product import InnerProduct, summed_rows, with_summed_rows
from dmin.runtime.errors import DminError


@dataclass(eq=False, repr=False)
class TRAK(DampedCurvatureMethod):
    """Influence of an example on the query's loss, by the empirical Fisher matrix.

    ``I(q, i) = g(q)ᵀ (C + λ)^{−1} g(i) / c(i) ,   g = Σ_t g_t ,   C = mean_i g(i) g(i)ᵀ``

    (Park et al. 2023, arXiv 2303.14186, without the ensemble; Q = 1 in diffusion, Zheng et al.
    2024). The constant 1/n does not matter to ranks and is left out. Draws of noise are summed.

    c is 1, or a normalisation that keeps examples of large gradient from ranking first everywhere:
    how far the example moves the model, ``‖(C + λ)^{−1} g(i)‖`` (``relative_if``: Barshan et al.
    2020, "RelatIF", arXiv 2003.11630), or the norm of its gradient (``renormalised_if``: Hammoudeh
    & Lowd 2022).

    D-TRAK takes ``g = Σ_t ∇_θ mean(ε_θ(x_t, t)²)`` on both sides, by the readout
    ``mean_squared_output``: without a theoretical justification, but better in experiments (Zheng
    et al. 2024, arXiv 2311.00500).

    Args:
        alpha: as :class:`~dmin.attribution.curvature.damped.DampedCurvatureMethod`, as are the
            next four.
        rank: of the curvature.
        memory: bytes that fitting may take.
        passes: over the store.
        effective: dimension, instead of α.
        readout: the function of the output that is differentiated.
        divisor: c: ``change`` of the model, ``length`` of the gradient, or None for 1.
        name: in tables and files.

    Raises:
        DminError: as :class:`DampedCurvatureMethod`, or another divisor.
    """

    _: KW_ONLY
    readout: str = "loss"
    divisor: Literal["change", "length"] | None = None
    name: str = "trak"

    def __post_init__(self) -> None:
        """Refuse another divisor."""
        super().__post_init__()
        if self.divisor not in (None, "change", "length"):
            raise DminError(f"method.divisor={self.divisor!r}: give change, length or null.")
        self.requires: Requires = replace(self.requires, readouts=(self.readout,))

    def fit(self, train: FeatureSet) -> None:
        """Fit the curvature of the summed gradients."""
        _, _, groups, dim = train.store.layout.row_shape
        self.fit_to(train, self._rows, (len(train), 1, groups * dim), "summed")

    def transform_query(self, queries: ExampleBlock) -> InnerProduct | Tensor:
        """Return preconditioned queries; plain vectors ``[Q, G·k]`` if scores are divided."""
        vectors = self.preconditioned(queries)
        return vectors if self.divisor else with_summed_rows(vectors, queries, self.readout)

    def preconditioned(self, queries: ExampleBlock) -> Tensor:
        """Return ``(C + λ)^{−1} g`` of queries, ``[Q, G·k]``."""
        return self.power(self._rows(queries), 1.0, queries.ids)[:, 0]

    def score(self, queries: InnerProduct | Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        if isinstance(queries, InnerProduct):
            return queries.scores(train)
        rows = self._rows(train)
        if self.divisor == "change":
            divisor = self.curvature.quadratic(rows, self.damping, 2.0)[:, 0].sqrt().to(rows)
        else:
            divisor = rows.norm(dim=(1, 2))
        return queries @ rows[:, 0].T / divisor.clamp(min=torch.finfo(torch.float32).tiny)

    def contributions(self, queries: InnerProduct | Tensor, train: ExampleBlock) -> Tensor | None:
        """Return what groups add at timesteps, ``[Q, n, T, G]``; None where scores are divided."""
        return queries.contributions(train) if isinstance(queries, InnerProduct) else None

    def _rows(self, block: ExampleBlock) -> Tensor:
        """Return the gradient summed over timesteps and draws, ``[n, 1, G·k]``."""
        return summed_rows(block, self.readout).flatten(1)[:, None]


@dataclass(eq=False, repr=False)
class JourneyTRAK(TRAK):
    """TRAK averaged over intermediate states of the query's generation.

    ``I(q, i) = (1/J) Σ_j g(x̂_j)ᵀ (C + λ)^{−1} g(i)``, x̂_j the model's estimate of the clean image
    at J steps of the generation (Georgiev et al. 2023, "The Journey, Not the Destination", arXiv
    2312.06205). Each gradient is summed over all timesteps of the store, as Zheng et al. 2024 do;
    the original takes the step's own timestep alone.

    It needs ``queries=generated queries.trajectory=J``.
    """

    _: KW_ONLY
    name: str = "journey_trak"
    requires = Requires(trajectory=True)

    def preconditioned(self, queries: ExampleBlock) -> Tensor:
        """Return the mean over the states of preconditioned queries, ``[Q, G·k]``."""
        states = [super(JourneyTRAK, self).preconditioned(state) for state in queries.trajectory]
        return torch.stack(states).mean(0)
