"""Curvature of a model's loss: products with its Hessian and GGN, and their leading eigenpairs."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad

from dmin.attribution.curvature.functional_loss import FunctionalLoss, Weights, reverse
from dmin.data.base import Example
from dmin.diffusion.inputs import NoisedBatch
from dmin.models.base import weight_of_squares
from dmin.models.masked import count_of
from dmin.runtime.errors import DminError

Kind = Literal["ggn", "hessian"]


class Eigenpairs(NamedTuple):
    """Leading eigenvalues, descending, and their orthonormal eigenvectors."""

    values: Tensor  # float64 [r]
    vectors: Tensor  # [r, P]


class LossCurvature:
    """The second derivative of the mean loss of examples, as a product with vectors.

    ``H = (1/n) Σ_i r_i Σ_{d,t} ∇²_θ L(θ; x_i, ε_{d,t}, t)``

    or its generalised Gauss–Newton part ``Σ Jᵀ (2w/P) J``, J the Jacobian of the P predicted
    numbers: positive semi-definite, and for a squared error equal to the Fisher matrix of targets
    drawn from the model (Martens 2020, arXiv 1412.1193). Products are forward-over-reverse
    (Pearlmutter 1994): one costs about two gradients of the examples, and no matrix is formed.

    Args:
        loss: at all points of the store, or at one timestep.
        examples: the examples.
        counts: r, how often each counts, ``n = Σ r_i``; None: once.
        kind: ``ggn`` or ``hessian``.
        batch_size: pairs of example and point in one pass.

    Raises:
        DminError: no examples, or another kind.
    """

    def __init__(
        self,
        loss: FunctionalLoss,
        examples: Sequence[Example],
        kind: Kind = "ggn",
        batch_size: int = 512,
        counts: Tensor | None = None,
    ) -> None:
        if kind not in ("ggn", "hessian") or not examples or batch_size < 1:
            raise DminError(
                f"curvature={kind!r} of {len(examples)} examples, batch_size={batch_size}: give "
                f"ggn or hessian, and at least one of each."
            )
        self.loss = loss
        self.kind = kind
        self.pairs: list[NoisedBatch] = list(loss.pairs(examples, counts).split(batch_size))

    def product(self, vector: Tensor, pairs: Sequence[NoisedBatch] | None = None) -> Tensor:
        """Return ``H v``, ``[P]``.

        Args:
            vector: v, ``[P]``.
            pairs: some of the examples instead, of a whole number of them.
        """
        chosen = self.pairs if pairs is None else pairs
        direction = self.loss.shaped(vector)
        total = torch.zeros_like(vector, dtype=torch.float64)
        for piece in chosen:
            one = self._hessian if self.kind == "hessian" else self._ggn
            total += self.loss.flat(one(direction, piece))
        points = sum(float(count_of(piece).sum()) for piece in chosen)
        return (total * self.loss.points / points).to(vector)

    def eigenpairs(
        self,
        count: int = 1,
        tolerance: float = 1e-6,
        seed: int = 0,
        pairs: Sequence[NoisedBatch] | None = None,
    ) -> Eigenpairs:
        """Return the eigenpairs of largest magnitude by Lanczos iteration (SciPy's ARPACK).

        A multiple eigenvalue, as the last layer has under a squared error, may be
        found fewer times.

        Args:
            count: how many, less than P.
            tolerance: relative, of the eigenvalues.
            seed: key of the starting vector.
            pairs: some of the examples instead, as for :meth:`product`.

        Raises:
            DminError: count is out of range.
        """
        from scipy.sparse.linalg import LinearOperator, eigsh

        size = self.loss.count
        if not 1 <= count < size:
            raise DminError(f"count={count}: choose 1 … {size - 1} eigenpairs.")
        like = next(iter(self.loss.weights.values()))
        start = np.random.default_rng(seed).standard_normal(size)

        def times(v: np.ndarray) -> np.ndarray:
            found = self.product(torch.from_numpy(v.reshape(-1)).to(like), pairs).double()
            return found.cpu().numpy()

        operator = LinearOperator((size, size), matvec=times, dtype=np.float64)
        values, vectors = eigsh(operator, count, which="LM", v0=start, tol=tolerance)
        order = np.argsort(-values)
        return Eigenpairs(
            torch.from_numpy(values[order].copy()),
            torch.from_numpy(vectors.T[order].copy()).to(like),
        )

    def _hessian(self, direction: Weights, pairs: NoisedBatch) -> Weights:
        counts = count_of(pairs).to(next(iter(self.loss.weights.values())))
        return self.loss.along(grad(lambda w: self.loss.losses(w, pairs) @ counts), direction)

    def _ggn(self, direction: Weights, pairs: NoisedBatch) -> Weights:
        scale: list[Tensor] = []

        def predicted(weights: Weights) -> Tensor:
            found = self.loss.predict(weights, pairs)
            size = found.prediction[0].numel()
            scale[:] = [2 * weight_of_squares(found).detach() * count_of(pairs) / size]
            return found.prediction.flatten(1)

        change = self.loss.along(predicted, direction)
        back = reverse(predicted, self.loss.weights)[1]
        found: Weights = back(scale[0][:, None] * change)[0]
        return found
