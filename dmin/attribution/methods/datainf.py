"""DataInf: the inverse of a sum, approximated by the mean of inverses, layer by layer."""

import torch
from torch import Tensor

from dmin.attribution.curvature.curvature import MEMORY, PASSES
from dmin.attribution.curvature.damped import DampedCurvatureMethod
from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.inner_product import InnerProduct, summed_rows, with_summed_rows
from dmin.attribution.method import InnerProductMethod


class DataInf(DampedCurvatureMethod, InnerProductMethod):
    """Influence by a closed form for each group of parameters.

    ``I(q, i) = Σ_l g_l(q)ᵀ [ (1/n) Σ_j (λ_l + g_l(j) g_l(j)ᵀ)^{−1} ] g_l(i)``

    with ``λ_l = α · mean(g_l²)`` over examples and the entries of the sketch, ``g = Σ_t g_t``, and
    each inverse by Sherman and Morrison: ``(1 − g gᵀ/(λ + ‖g‖²)) / λ`` (Kwon et al. 2024, arXiv
    2310.00902, α = 0.1). The sum over j is stored like a curvature. For a store
    of one group the whole model is a single layer.

    Args:
        alpha: α, in units of the mean square of an entry.
        rank: see :class:`DampedCurvatureMethod`, also for the next two.
        memory: bytes that fitting may take.
        passes: over the store.

    Raises:
        DminError: α is not positive.
    """

    name = "datainf"

    def __init__(
        self,
        alpha: float = 0.1,
        rank: int | None = None,
        memory: int = MEMORY,
        passes: int = PASSES,
    ) -> None:
        super().__init__(alpha, rank=rank, memory=memory, passes=passes)

    def fit(self, train: FeatureSet) -> None:
        """Fit ``(1/n) Σ_j g gᵀ / (λ + ‖g‖²)`` of each group."""
        squared = torch.zeros(len(train.store.layout.groups), dtype=torch.float64)
        for block in train.blocks(self.requires):
            squared += train.counted(summed_rows(block).double().square(), block).sum((0, 2))
        groups, dim = train.store.layout.row_shape[2:]
        assert self.alpha is not None
        self._lambda = self.alpha * squared / (train.total * dim)  # [G]
        self._lambda[self._lambda == 0] = 1  # a group without gradients adds nothing anyway

        def shrunk(block: ExampleBlock) -> Tensor:
            rows = summed_rows(block)
            length = rows.double().square().sum(2)
            return rows * (self._lambda + length).rsqrt().to(rows)[..., None]

        self.fit_to(train, shrunk, (len(train), groups, dim), f"shrunk {self.alpha}")

    def transform_query(self, queries: ExampleBlock) -> InnerProduct:
        """Return preconditioned queries."""
        rows = summed_rows(queries).double()
        product = self.curvature.power(rows, torch.zeros(rows.shape[1]), -1.0)
        vectors = (rows - product) / self._lambda[:, None]
        return with_summed_rows(vectors.float(), queries)
