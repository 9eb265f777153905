"""The plain gradient methods that DMin is compared with: GradDot and GradCos (Charpiat et al.)."""

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock
from dmin.attribution.inner_product import InnerProduct, summed_rows, with_summed_rows
from dmin.attribution.method import CosineMethod, InnerProductMethod


class GradDot(InnerProductMethod):
    """Inner product of the gradients summed over timesteps and draws.

    ``I(q, i) = ⟨Σ_t g_t(q), Σ_t g_t(i)⟩`` (Charpiat et al. 2019, arXiv 2102.05262; TracIn with one
    checkpoint, Pruthi et al. 2020, arXiv 2002.08484).
    """

    name = "grad_dot"

    def transform_query(self, queries: ExampleBlock) -> InnerProduct:
        """Return the summed gradients of the queries."""
        return with_summed_rows(summed_rows(queries), queries)


class GradCos(CosineMethod):
    """Cosine of the gradients summed over timesteps and draws.

    ``I(q, i) = cos(Σ_t g_t(q), Σ_t g_t(i))`` (GradCos in Charpiat et al. 2019, arXiv 2102.05262).
    """

    name = "grad_cos"

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return unit summed gradients, ``[Q, G·k]``."""
        return torch.nn.functional.normalize(summed_rows(queries).flatten(1), dim=1)
