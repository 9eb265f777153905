"""dmin's Hessian, GGN and EK-FAC beside those of curvlinops, on one tiny denoiser in float64.

    python experiments/curvature/against_curvlinops.py    # curvlinops-for-pytorch==3.0.1

curvlinops brings torchvision with it: give it an environment of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dmin.attribution.curvature.functional_loss import FunctionalLoss
from dmin.attribution.curvature.hessian import LossCurvature
from dmin.attribution.curvature.kronecker import KroneckerCurvature
from dmin.collect import GradientCollector
from dmin.data.digits import Digits
from dmin.diffusion.timesteps import Explicit
from dmin.models.base import DiffusionModel, Prediction
from dmin.runtime.escape import write_csv
from dmin.sketches import BlockCyclic

HERE = Path(__file__).parent
EXAMPLES, TIMES, WIDTH, SAMPLES, REPEATS = 100, (2, 5, 8), 12, 100, 7


class Denoiser(DiffusionModel):
    """Two linear layers on a noised digit and its time: what both libraries can take."""

    timesteps = range(9, -1, -1)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(65, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 64)
        self.network = nn.Sequential(*layers).double()

    def inputs(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha = (1 - t / 10)[:, None, None, None]
        noised = (alpha * x0 + (1 - alpha**2).sqrt() * noise).flatten(1)
        return torch.cat([noised, t[:, None] / 10], 1)

    def predict(self, x0, noise, t, condition) -> Prediction:
        prediction = self.network(self.inputs(x0, noise, t).double())
        return Prediction(prediction, noise.flatten(1), torch.ones(len(x0)))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """Return our CPU seconds over theirs, best of interleaved runs."""
    best = {ours: float("inf"), theirs: float("inf")}
    for _ in range(REPEATS):
        for run in best:
            start = time.process_time()
            run()
            best[run] = min(best[run], time.process_time() - start)
    return best[ours] / best[theirs]


def blocks(matrix: Tensor, sizes: list[int]) -> Tensor:
    """Return a matrix with all but its diagonal blocks zero."""
    parts = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.where(parts[:, None] == parts[None], matrix, 0)


def main() -> None:
    try:
        from curvlinops import EKFACLinearOperator, GGNLinearOperator, HessianLinearOperator
    except ImportError as error:
        raise SystemExit(f"{error}\n{__doc__}") from None
    torch.set_num_threads(1)
    model, examples = Denoiser(), Digits("train").examples[:EXAMPLES]
    origin = GradientCollector(model, BlockCyclic(256), Explicit(list(TIMES)))
    loss = FunctionalLoss(origin)
    pairs = loss.pairs(examples)
    data = [(model.inputs(*pairs[:3]).double(), pairs.noise.flatten(1).double())]
    params, points = list(model.network.parameters()), loss.points
    vectors = torch.randn(5, loss.count, generator=torch.Generator().manual_seed(1)).double()
    rows = []
    for kind, theirs in (("ggn", GGNLinearOperator), ("hessian", HessianLinearOperator)):
        operator = theirs(model.network, nn.MSELoss(), params, data, check_deterministic=False)
        ours = LossCurvature(loss, examples, kind, batch_size=10_000)
        # Their loss is a mean over the pairs, ours over examples of the sum over their points.
        expected = torch.stack([points * (operator @ v) for v in vectors])
        found = torch.stack([ours.product(v) for v in vectors])
        spent = ratio(lambda o=ours: o.product(vectors[0]), lambda o=operator: o @ vectors[0])
        rows.append(
            {
                "what": f"{kind} × vector",
                "difference": f"{relative(found, expected):.1e}",
                "ours to the exact": "",
                "theirs to the exact": "",
                "our seconds / theirs": f"{spent:.2f}",
            }
        )
        if kind == "ggn":
            identity = torch.eye(loss.count, dtype=torch.float64)
            dense = torch.stack([ours.product(v) for v in identity])
    rows.append(ekfac(EKFACLinearOperator, model, origin, pairs, data, dense))
    write_csv(HERE / "curvlinops.csv", rows)
    for row in rows:
        print(row)


def ekfac(operator, model, origin, pairs, data, dense: Tensor) -> dict[str, str]:
    """Compare both EK-FACs with each other, and with the blocks of the GGN they stand for."""
    loss, params = FunctionalLoss(origin), list(model.network.parameters())
    identity, points = torch.eye(loss.count, dtype=torch.float64), loss.points
    settings = {"mc_samples": SAMPLES, "separate_weight_and_bias": False}
    quiet = {"check_deterministic": False, **settings}

    def theirs() -> Tensor:
        found = operator(model.network, nn.MSELoss(), params, data, **quiet)
        return points * (found @ identity)

    def ours() -> Tensor:
        found = KroneckerCurvature(loss, origin.attributed)
        found.fit(pairs, EXAMPLES, SAMPLES, 10_000, 0)
        return loss.flat_rows(found.power(loss.shaped(identity), 1e-12, -1.0))

    start = time.process_time()
    mine = ours()
    middle = time.process_time()
    other = theirs()
    spent = (middle - start) / (time.process_time() - middle)
    exact = blocks(dense, [66 * WIDTH, (WIDTH + 1) * 64])  # each layer with its bias
    return {
        "what": f"EK-FAC, {SAMPLES} targets",
        "difference": f"{relative(mine, other):.1e}",
        "ours to the exact": f"{relative(mine, exact):.1e}",
        "theirs to the exact": f"{relative(other, exact):.1e}",
        "our seconds / theirs": f"{spent:.2f}",
    }


if __name__ == "__main__":
    main()
