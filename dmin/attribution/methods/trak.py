"""TRAK and its kin: one gradient an example, summed over timesteps, and one damped inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from dmin.attribution.curvature.damped import DampedCurvatureMethod
from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.method import InnerProduct
from dmin.attribution.rows import over_rows, summed_rows
from dmin.store import Layout


class TRAK(DampedCurvatureMethod):
    """Influence of an example on the query's loss, by the empirical Fisher matrix.

    ``I(q, i) = g(q)ᵀ (C + λ)^{−1} g(i) ,   g = Σ_t g_t ,   C = mean_i g(i) g(i)ᵀ``

    (Park et al. 2023, arXiv 2303.14186, without the ensemble; Q = 1 in diffusion, Zheng et al.
    2024). The constant 1/n does not matter to ranks and is left out. Draws of noise are summed.

    Settings are those of :class:`~dmin.attribution.curvature.damped.DampedCurvatureMethod`.
    """

    name = "trak"

    def fit(self, train: FeatureSet) -> None:
        """Fit the curvature of the summed gradients."""
        _, _, groups, dim = train.store.layout.row_shape
        self.fit_to(train, self._rows, (len(train), 1, groups * dim), "summed")

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return preconditioned queries, ``[Q, G·k]``."""
        return self.power(self._rows(queries), 1.0, queries.ids)[:, 0]

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        rows = self._rows(train)
        return queries @ rows[:, 0].T / self._divisor(rows)

    def linear(self, queries: Tensor, layout: Layout) -> InnerProduct | None:
        """Return each query once for every draw and timestep; see the base class."""
        return over_rows(queries, layout, self.requires.readouts[0])

    def _divisor(self, rows: Tensor) -> Tensor:
        """Return what each training example's score is divided by, ``[n]`` or ``[1]``."""
        return rows.new_ones(1)

    def _rows(self, block: ExampleBlock) -> Tensor:
        """Return the gradient summed over timesteps and draws, ``[n, 1, G·k]``."""
        return summed_rows(block, self.requires.readouts[0]).flatten(1)[:, None]


class RelativeIF(TRAK):
    """TRAK divided by how far the example moves the model, ``‖(C + λ)^{−1} g(i)‖``.

    Keeps examples of large gradient from leading every list (Barshan et al. 2020, "RelatIF",
    arXiv 2003.11630).
    """

    name = "relative_if"

    def linear(self, queries: Tensor, layout: Layout) -> None:
        """Return None: what divides a score is not the norm of a stored row."""
        return None

    def _divisor(self, rows: Tensor) -> Tensor:
        squared = self.curvature.quadratic(rows, self.damping, 2.0)[:, 0]
        return squared.sqrt().clamp(min=torch.finfo(torch.float32).tiny).to(rows)


class RenormalisedIF(TRAK):
    """TRAK divided by the norm of the example's gradient, ``‖g(i)‖`` (Hammoudeh & Lowd 2022)."""

    name = "renormalised_if"

    def linear(self, queries: Tensor, layout: Layout) -> None:
        """Return None: what divides a score is not the norm of a stored row."""
        return None

    def _divisor(self, rows: Tensor) -> Tensor:
        return rows.norm(dim=(1, 2)).clamp(min=torch.finfo(torch.float32).tiny)


class DTRAK(TRAK):
    """TRAK of another function than the loss: the mean square of the model's output.

    ``g = Σ_t ∇_θ mean(ε_θ(x_t, t)²)`` on both sides: theory has no place for it, experiments do
    (Zheng et al. 2024, arXiv 2311.00500).
    """

    name = "d_trak"
    requires = Requires(readouts=("mean_squared_output",))


class JourneyTRAK(TRAK):
    """TRAK averaged over what the query looked like while it was generated.

    ``I(q, i) = (1/J) Σ_j g(x̂_j)ᵀ (C + λ)^{−1} g(i)``, x̂_j the model's estimate of the clean image
    at J steps of the generation (Georgiev et al. 2023, "The Journey, Not the Destination", arXiv
    2312.06205). Each gradient is summed over all timesteps of the store, as Zheng et al. 2024 do;
    the original takes the step's own timestep alone.

    It needs ``queries=generated queries.journey=J``.
    """

    name = "journey_trak"
    requires = Requires(journey=True)

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return the mean over the states of preconditioned queries, ``[Q, G·k]``."""
        states = [TRAK.transform_query(self, state) for state in queries.journey]
        return torch.stack(states).mean(0)
