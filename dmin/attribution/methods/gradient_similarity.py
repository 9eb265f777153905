"""The plain gradient methods DMin is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock
from dmin.attribution.method import InnerProduct, Method, in_row_order
from dmin.attribution.rows import over_rows, summed_rows
from dmin.store import Layout


class DMinUnnormalised(Method):
    """DMin without its normalisation: inner products of the gradients, timestep by timestep.

    ``I(q, i) = Σ_t ⟨g_t(q), g_t(i)⟩``, averaged over noise draws

    (the row "w/o normalization" of Lin, Lao & Zhao, arXiv 2412.08637).
    """

    name = "dmin_unnormalised"

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return the sketched gradients of the queries, ``[Q, T, D·G·k]``."""
        return _gradients(queries)

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        return queries.flatten(1) @ _gradients(train).flatten(1).T

    def contributions(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return the inner product at each timestep, ``[Q, n, T]``."""
        return torch.einsum("qtm,ntm->qnt", queries, _gradients(train))

    def linear(self, queries: Tensor, layout: Layout) -> InnerProduct:
        """Return the queries in the store's order; see the base class."""
        return InnerProduct(in_row_order(queries, layout), "norm")


class GradDot(Method):
    """Inner product of the gradients summed over timesteps and draws.

    ``I(q, i) = ⟨Σ_t g_t(q), Σ_t g_t(i)⟩`` (Charpiat et al. 2019, arXiv 2102.05262; TracIn with one
    checkpoint, Pruthi et al. 2020, arXiv 2002.08484).
    """

    name = "grad_dot"

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return the summed gradients of the queries, ``[Q, G·k]``."""
        return summed_rows(queries).flatten(1)

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        return queries @ summed_rows(train).flatten(1).T

    def linear(self, queries: Tensor, layout: Layout) -> InnerProduct:
        """Return each query once for every draw and timestep; see the base class."""
        return over_rows(queries, layout)


class GradCos(Method):
    """Cosine of the gradients summed over timesteps and draws.

    ``I(q, i) = cos(Σ_t g_t(q), Σ_t g_t(i))`` (GradCos in Charpiat et al. 2019, arXiv 2102.05262).
    """

    name = "grad_cos"

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return unit summed gradients, ``[Q, G·k]``."""
        return self._unit(queries)

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        return queries @ self._unit(train).T

    def _unit(self, block: ExampleBlock) -> Tensor:
        return torch.nn.functional.normalize(summed_rows(block).flatten(1), dim=1)


def _gradients(block: ExampleBlock) -> Tensor:
    """Undo the unit scaling of the rows: ``[n, T, D·G·k]``, draws averaged by 1/√D a side."""
    features, norms = block.features["loss"], block.norms["loss"]
    length = norms.square().sum(-1, keepdim=True).sqrt()[..., None]
    return (features * length / features.shape[1] ** 0.5).transpose(1, 2).flatten(2)
