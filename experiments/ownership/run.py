"""What does it cost to know whose row is whose? Collections with and without, in turns."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import nn

from dmin import DiffusionModel, Prediction
from dmin.collect.collector import Collector
from dmin.collect.guard import Guard
from dmin.diffusion import Stratified
from dmin.gradients.ownership import Ownership
from dmin.runtime.escape import write_csv
from dmin.sketches import Auto

sys.path.insert(0, str(Path(__file__).parents[2]))
from experiments.record import recorded

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TIMESTEPS = 10
COLUMNS = [
    *("workload", "pairs", "passes", "median", "low", "high"),
    *("plain_seconds", "probe_seconds", "guard_seconds"),
]


class Denoiser(DiffusionModel):
    """Noise prediction by a network, without a checkpoint."""

    timesteps = range(999, -1, -1)

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval()

    def predict(self, x0, noise, t, condition):
        """Return the prediction of the noise."""
        share = (t.float() / 1000).view(-1, *[1] * (x0.ndim - 1))
        prediction = self.network((1 - share) * x0 + share * noise, t)
        return Prediction(prediction, noise, torch.ones(len(x0)))


class UNet(nn.Module):
    """The UNet of the digits: .7 M parameters, 8 × 8."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )

    def forward(self, x, t):
        """Return what it takes for noise."""
        return self.unet(x, t, return_dict=False)[0]


class Tokens(nn.Module):
    """A transformer over 64 tokens; example after example, or token after token."""

    def __init__(self, sequence_first: bool) -> None:
        super().__init__()
        self.sequence_first = sequence_first
        self.inner, self.out = nn.Linear(1, 128), nn.Linear(128, 1)
        sizes = ((128, 512), (512, 128))
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(128), nn.Linear(*sizes[0]), nn.Linear(*sizes[1])])
            for _ in range(4)
        )

    def forward(self, x, t):
        """Return what it takes for noise."""
        h = self.inner(x.flatten(1)[..., None]) + (t.float() / 1000).view(-1, 1, 1)
        h = h.transpose(0, 1) if self.sequence_first else h
        for norm, up, down in self.layers:
            h = h + down(nn.functional.gelu(up(norm(h))))
            h = h + h.mean(0 if self.sequence_first else 1, keepdim=True)
        h = h.transpose(0, 1) if self.sequence_first else h
        return self.out(h).view(x.shape)


WORKLOADS = {
    "unet": UNet,
    "tokens": lambda: Tokens(False),
    "tokens, sequence first": lambda: Tokens(True),
}


def measure(name: str, pairs: int, passes: int, turns: int) -> dict[str, object]:
    """Return the row of one workload: collecting with all checks over collecting with none."""
    torch.manual_seed(0)
    collector = Collector(
        Denoiser(WORKLOADS[name]()), Auto(4096), Stratified(TIMESTEPS), microbatch=pairs
    )
    count = passes * pairs // TIMESTEPS
    x0 = torch.rand(count, 1, 8, 8)
    inputs = collector.inputs(x0, {}, [f"x{i}" for i in range(count)])

    known = Ownership()

    def without() -> None:
        collector.passes(inputs, pairs, lambda batch: collector.run(batch, known))

    def checked() -> tuple[float, float]:
        guard = Guard(collector, Ownership())
        collector.passes(inputs, pairs, guard.run)
        return guard.ownership.seconds, guard.seconds

    without()  # warms up, and finds out what is known from here on
    ratios, plain, probes, guards = [], [], [], []
    for turn in range(turns):
        seconds: dict[str, float] = {}
        for way in ("without", "checked") if turn % 2 else ("checked", "without"):
            start = time.perf_counter()
            if way == "checked":
                probe, guard = checked()
            else:
                without()
            seconds[way] = time.perf_counter() - start
        ratios.append(seconds["checked"] / seconds["without"])
        plain.append(seconds["without"])
        probes.append(probe)
        guards.append(guard)
        print(f"{name}: {ratios[-1]:.4f}", flush=True)
    drawn = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    means = [f"{np.median(each):.3f}" for each in (plain, probes, guards)]
    ratio = [f"{x:.4f}" for x in (np.median(ratios), low, high)]
    return dict(zip(COLUMNS, [name, pairs, passes, *ratio, *means], strict=True))


def main() -> None:
    """Measure all workloads; write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, args.pairs, args.passes, args.turns) for name in WORKLOADS]
    write_csv(HERE / "cost.csv", rows)
    figure, axes = plt.subplots(figsize=(6, 2.2), layout="constrained")
    for i, row in enumerate(rows):
        median, low, high = (100 * (float(row[c]) - 1) for c in ("median", "low", "high"))
        axes.errorbar(median, i, xerr=[[median - low], [high - median]], fmt="o", capsize=3)
    axes.set_yticks(range(len(rows)), [str(row["workload"]) for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.axvline(3, color="gray", linestyle=":")
    axes.set_xlabel(f"% more time than without any check, {args.passes} passes")
    figure.savefig(HERE / "cost.png", dpi=150)


if __name__ == "__main__":
    with recorded(__file__, seeds=[0]):
        main()
