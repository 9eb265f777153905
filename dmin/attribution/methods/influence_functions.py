"""Influence functions with the exact curvature of the loss, solved iteratively: for small models.

The query's gradient is multiplied by the inverse in the space of all parameters, then sketched:
``⟨S (H + λ)⁻¹ g(q), S g(i)⟩`` needs only the stored rows of the training examples.
"""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.curvature.functional_loss import FunctionalLoss
from dmin.attribution.curvature.hessian import Kind, LossCurvature
from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.inner_product import InnerProduct, with_summed_rows
from dmin.attribution.method import InnerProductMethod
from dmin.runtime.errors import DminError
from dmin.runtime.sampling import evenly


@dataclass(eq=False, repr=False)
class InverseCurvature(InnerProductMethod):
    """Influence of an example on the query's loss, by the curvature of the training loss.

    ``I(q, i) = ⟨S (H + λ)^{−1} g(q), S g(i)⟩ ,   g = Σ_{d,t} g_{d,t} ,   λ = damping · ‖H‖``

    (Koh & Liang 2017, arXiv 1703.04730), H of
    :class:`~dmin.attribution.curvature.hessian.LossCurvature` and ‖H‖ its largest
    eigenvalue. A positive score: training on i lowers the loss of q.

    Args:
        damping: λ, as a share of H's largest eigenvalue.
        curvature: ``ggn``, or ``hessian``, which may have negative eigenvalues.
        examples: training examples that H is averaged over, evenly spaced; None for all.
        batch_size: pairs of example and point in one pass.

    Raises:
        DminError: a value is out of range.
    """

    damping: float = 0.01
    curvature: Kind = "ggn"
    examples: int | None = None
    batch_size: int = 2048

    requires = Requires(model=True)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 < self.damping < np.inf or (self.examples is not None and self.examples < 1):
            raise DminError(
                f"method.damping={self.damping}, method.examples={self.examples}: give a positive "
                f"fraction of the largest eigenvalue, such as 0.01, and at least one example (or "
                f"null)."
            )

    def fit(self, train: FeatureSet) -> None:
        """Encode the training examples and find the largest eigenvalue."""
        assert train.origin is not None  # check_pair asks
        self.sketch = train.origin.sketch
        self.loss: FunctionalLoss = FunctionalLoss(train.origin, known=train)
        ids = train.store.ids
        rows = evenly(len(train), self.examples)
        chosen, counts = [train.example(ids[row]) for row in rows], train.counts_of(rows)
        self.operator: LossCurvature = LossCurvature(
            self.loss, chosen, self.curvature, self.batch_size, counts
        )
        self.largest: float = float(self.operator.eigenpairs(1, 1e-3).values.abs()[0])
        # Without any curvature there is nothing to invert: any λ will do.
        self.shift: float = self.damping * self.largest or 1.0

    def notes(self) -> dict[str, str]:
        """Return the largest eigenvalue and the damping."""
        return {
            "curvature": f"{self.curvature} of the model, largest eigenvalue {self.largest:.4g}, "
            f"damping {self.shift:.4g}"
        }

    def transform_query(self, queries: ExampleBlock) -> InnerProduct:
        """Return preconditioned queries, sketched."""
        solved = self.solve(self.loss.gradients(queries.examples, self.batch_size))
        return with_summed_rows(self.sketch.of(self.loss.shaped(solved)).float(), queries)

    @abstractmethod
    def solve(self, gradients: Tensor) -> Tensor:
        """Return ``(H + λ)^{−1} g`` of each row, ``[n, P]``."""


@dataclass(eq=False, repr=False)
class CG(InverseCurvature):
    """Influence by conjugate gradients (Martens 2010, "Hessian-free"; Hestenes & Stiefel 1952).

    Args:
        damping: as :class:`InverseCurvature`, as are the next three.
        curvature: ``ggn`` or ``hessian``.
        examples: that H is averaged over.
        batch_size: of one pass.
        iterations: maximum number; each costs one product with H.
        tolerance: of the residual, relative to the gradient, at which it stops.

    Raises:
        DminError: a value is out of range, or H + λ is not positive definite.
    """

    iterations: int = 100
    tolerance: float = 1e-3

    name = "cg"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        if self.iterations < 1 or not self.tolerance > 0:
            raise DminError(
                f"method.iterations={self.iterations}, method.tolerance={self.tolerance}: at least "
                f"one iteration and a positive tolerance are needed."
            )

    def solve(self, gradients: Tensor) -> Tensor:
        """Solve for one row after the other."""
        return torch.stack([self._solve(g) for g in gradients])

    def _solve(self, gradient: Tensor) -> Tensor:
        b = gradient.double()
        x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
        squared = residual @ residual
        for _ in range(self.iterations):
            if squared <= self.tolerance**2 * (b @ b):
                break
            product = self.operator.product(direction.to(gradient)).double()
            product += self.shift * direction
            bend = direction @ product
            if bend <= 0:
                raise DminError(
                    f"method.curvature={self.curvature} with method.damping={self.damping:g} is "
                    f"not positive definite, which conjugate gradients need. Raise "
                    f"the damping, or set method.curvature=ggn."
                )
            step = squared / bend
            x += step * direction
            residual -= step * product
            before, squared = squared, residual @ residual
            direction = residual + squared / before * direction
        return x.to(gradient)


@dataclass(eq=False, repr=False)
class LiSSA(InverseCurvature):
    """Influence by a stochastic Neumann series (Agarwal, Bullins & Hazan 2017, arXiv 1602.03943).

    ``h ← g + (1 − (H_B + λ)/s) h`` over random batches B, and in the end ``h / s``

    with s the largest ‖H_B‖, plus λ: then the series cannot diverge for a GGN, and after j
    steps the error has shrunk by at least ``(1 − λ/s)^j``.

    Args:
        damping: as :class:`InverseCurvature`, as are the next three.
        curvature: ``ggn`` or ``hessian``.
        examples: that H is averaged over.
        batch_size: pairs in one batch B; all pairs if it exceeds their number.
        steps: j, of the series.
        repeats: series averaged.
        seed: key of the batches.

    Raises:
        DminError: a value is out of range, or the series diverged.
    """

    steps: int = 300
    repeats: int = 1
    seed: int = 0

    name = "lissa"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        if self.steps < 1 or self.repeats < 1:
            raise DminError(
                f"method.steps={self.steps}, method.repeats={self.repeats}: at least one of each "
                f"is needed."
            )

    def fit(self, train: FeatureSet) -> None:
        """Find the largest eigenvalue of all, and of any batch."""
        super().fit(train)
        each = [self.operator.eigenpairs(1, 1e-2, pairs=[b]) for b in self.operator.pairs]
        self.scale: float = 1.01 * max(float(e.values.abs()[0]) for e in each) + self.shift

    def solve(self, gradients: Tensor) -> Tensor:
        """Run the series for one row after the other."""
        return torch.stack([self._solve(g) for g in gradients])

    def _solve(self, gradient: Tensor) -> Tensor:
        scale, batches = self.scale, self.operator.pairs
        drawn = np.random.default_rng(self.seed).integers(
            len(batches), size=(self.repeats, self.steps)
        )
        # Each step shrinks what it is given by 1 − λ/s at least, or the curvature is negative.
        total, limit = torch.zeros_like(gradient), 2 * float(gradient.norm()) * scale / self.shift
        for order in drawn:
            h = gradient.clone()
            for number in order:
                product = self.operator.product(h, [batches[number]])
                h = gradient + h - (product + self.shift * h) / scale
                if not float(h.norm()) <= limit:
                    raise DminError(
                        f"the series of method=lissa diverged: with method.damping="
                        f"{self.damping:g} the Hessian has negative eigenvalues. Raise the "
                        f"damping, or set method.curvature=ggn."
                    )
            total += h / scale
        return total / self.repeats


@dataclass(eq=False, repr=False)
class Arnoldi(InverseCurvature):
    """Influence within the leading eigenvectors of the curvature (Schioppa et al. 2022).

    ``(H + λ)^{−1} ≈ Σ_j v_j v_jᵀ / (λ_j + λ)`` over the ``rank`` eigenpairs of largest |λ_j|

    (arXiv 2112.03052): components outside of them are dropped. For a symmetric matrix Arnoldi's
    iteration is Lanczos'.

    Args:
        damping: as :class:`InverseCurvature`, as are the next three.
        curvature: ``ggn`` or ``hessian``, whose negative eigenvalues are dropped.
        examples: that H is averaged over.
        batch_size: of one pass.
        rank: eigenpairs.

    Raises:
        DminError: a value is out of range.
    """

    rank: int = 50

    name = "arnoldi"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        if self.rank < 1:
            raise DminError(f"method.rank={self.rank}: give at least one eigenpair.")

    def fit(self, train: FeatureSet) -> None:
        """Find the eigenpairs."""
        super().fit(train)
        self.values, self.vectors = self.operator.eigenpairs(self.rank, 1e-3)

    def solve(self, gradients: Tensor) -> Tensor:
        """Project onto the eigenvectors, divide, and sum."""
        positive = self.values > 0
        inverse = torch.where(positive, 1 / (self.values + self.shift), 0).to(gradients)
        return (gradients @ self.vectors.T * inverse) @ self.vectors
