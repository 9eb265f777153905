"""Influence functions with EK-FAC, and attribution by unlearning the query in one such step."""

import math
from typing import Literal

import torch
from torch import Tensor

from dmin.attribution.curvature.functional_loss import FunctionalLoss, Weights
from dmin.attribution.curvature.kronecker import KroneckerCurvature
from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.inner_product import InnerProduct, with_summed_rows
from dmin.attribution.method import InnerProductMethod, Method
from dmin.diffusion.inputs import NoisedBatch
from dmin.runtime.errors import DminError
from dmin.runtime.sampling import evenly


class KroneckerMethod(Method):
    """A method that preconditions the full gradients of queries by the GGN of each layer.

    F of :class:`~dmin.attribution.curvature.kronecker.KroneckerCurvature`; fitting takes two passes
    over the training examples.

    Args:
        damping: λ of each layer, as a share of its mean eigenvalue.
        samples: targets drawn for each example, draw and timestep.
        examples: training examples that F is averaged over, evenly spaced; None for all.
        batch_size: pairs of example and point in one pass.
        seed: key of the targets.

    Raises:
        DminError: a value is out of range.
    """

    fisher: Literal["ekfac", "diagonal"] = "ekfac"

    def __init__(
        self,
        damping: float = 0.1,
        samples: int = 1,
        examples: int | None = None,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        if not 0 < damping < math.inf or samples < 1 or (examples is not None and examples < 1):
            raise DminError(
                f"method.damping={damping}, method.samples={samples}, method.examples={examples}: "
                f"give a positive fraction of the mean eigenvalue, and at least one sample and "
                f"example."
            )
        self.damping = damping
        self.samples = samples
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed

    def fit(self, train: FeatureSet) -> None:
        """Compute the layers' eigenvectors and eigenvalues."""
        assert train.origin is not None  # check_pair asks
        self.loss: FunctionalLoss = FunctionalLoss(train.origin, known=train)
        ids = train.store.ids
        rows = evenly(len(train), self.examples)
        chosen, counts = [train.example(ids[row]) for row in rows], train.counts_of(rows)
        self.curvature: KroneckerCurvature = KroneckerCurvature(
            self.loss, train.origin.attributed, self.fisher == "diagonal"
        )
        pairs = self.loss.pairs(chosen, counts)
        total = len(chosen) if counts is None else float(counts.sum())
        self.curvature.fit(pairs, total, self.samples, self.batch_size, self.seed)

    def notes(self) -> dict[str, str]:
        """List the parameters with a diagonal block only."""
        few, blocks = self.curvature.diagonal, self.curvature.blocks
        names = ", ".join(few[:6]) + (" …" if len(few) > 6 else "")
        return {
            "curvature": f"{len(blocks) - len(few)} Kronecker blocks"
            + (f"; diagonal only: {len(few)} parameters ({names})" if few else "")
        }

    def solve(self, queries: ExampleBlock) -> Weights:
        """Return the preconditioned gradients of queries, ``[Q, *shape]`` by name."""
        gradients = self.loss.shaped(self.loss.gradients(queries.examples, self.batch_size))
        return self.curvature.power(gradients, self.damping, 1.0)


class EKFAC(KroneckerMethod, InnerProductMethod):
    """Influence of an example on the query's loss, by the GGN of each layer.

    ``I(q, i) = ⟨S (F + λ)^{−1} g(q), S g(i)⟩ ,   g = Σ_{d,t} g_{d,t}``

    (Grosse et al. 2023, arXiv 2308.03296; Mlodozeniec et al. 2025 for diffusion, arXiv 2410.13850);
    the full gradient of the query is preconditioned, then sketched. Settings are those of
    :class:`KroneckerMethod`.
    """

    name = "ekfac"
    requires: Requires = Requires(model=True)

    def fit(self, train: FeatureSet) -> None:
        """Compute the layers' eigenvectors and eigenvalues."""
        super().fit(train)
        assert train.origin is not None  # check_pair asks
        self.sketch = train.origin.sketch

    def transform_query(self, queries: ExampleBlock) -> InnerProduct:
        """Return preconditioned queries, sketched."""
        return with_summed_rows(self.sketch.of(self.solve(queries)).float(), queries)


class Unlearning(KroneckerMethod):
    """Attribution by unlearning: unlearn the query in one step and measure each example's loss.

    ``I(q, i) = L(i; θ + η (F + λ)^{−1} g(q)) − L(i; θ)``

    the loss averaged over draws and timesteps (Wang et al. 2024, "Data Attribution for
    Text-to-Image Models by Unlearning Synthesized Images", arXiv 2406.09408). For small models:
    each query needs a copy of the weights in memory, and every training example is run through each
    copy. The store's rows are not read.

    Args:
        step: size of the step, ``‖Δθ‖ / ‖θ‖``, which determines η.
        fisher: ``ekfac``, or ``diagonal`` as in the paper.
        damping: see :class:`KroneckerMethod`, also for the others.
        samples: targets drawn.
        examples: that F is averaged over.
        batch_size: pairs in one pass.
        seed: key of the targets.

    Raises:
        DminError: a value is out of range.
    """

    name = "unlearning"
    requires: Requires = Requires(readouts=(), model=True)

    def __init__(
        self,
        step: float = 0.01,
        fisher: Literal["ekfac", "diagonal"] = "ekfac",
        damping: float = 0.1,
        samples: int = 1,
        examples: int | None = None,
        batch_size: int = 2048,
        seed: int = 0,
    ) -> None:
        super().__init__(damping, samples, examples, batch_size, seed)
        if not 0 < step < math.inf or fisher not in ("ekfac", "diagonal"):
            raise DminError(
                f"method.step={step}, method.fisher={fisher!r}: give a positive fraction of the "
                f"weights' norm, such as 0.01, and ekfac or diagonal."
            )
        self.step, self.fisher = step, fisher

    def transform_query(self, queries: ExampleBlock) -> list[Weights]:
        """Return the weights that have unlearned each query."""
        solved = self.solve(queries)
        length = self.loss.flat(self.loss.weights).norm()
        unlearned = []
        for number in range(len(queries.ids)):
            move = {name: value[number] for name, value in solved.items()}
            norm = self.loss.flat(move).norm().clamp(min=torch.finfo(torch.float32).tiny)
            scale = self.step * length / norm
            unlearned.append({n: w + scale * move[n] for n, w in self.loss.weights.items()})
        return unlearned

    def score(self, queries: list[Weights], train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        return self.contributions(queries, train).sum((2, 3))

    def contributions(self, queries: list[Weights], train: ExampleBlock) -> Tensor:
        """Return the rise of the loss at each timestep, ``[Q, n, T, 1]``."""
        pairs = self.loss.pairs(train.examples)
        before = self._losses(self.loss.weights, pairs)
        rise = torch.stack([self._losses(weights, pairs) - before for weights in queries])
        each = rise.unflatten(1, (len(train.ids), self.loss.noise.draws, -1))  # [Q, n, D, T]
        return (each.mean(2) / each.shape[3]).float()[..., None]

    @torch.no_grad()
    def _losses(self, weights: Weights, pairs: NoisedBatch) -> Tensor:
        pieces = pairs.split(self.batch_size)
        return torch.cat([self.loss.losses(weights, piece).double() for piece in pieces])
