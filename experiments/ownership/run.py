"""What does it cost to know whose row is whose? Collections with and without, in turns."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import nn

from dmin import DiffusionModel, Prediction
from dmin.collect.collector import Collector
from dmin.collect.features import Features
from dmin.collect.guard import Guard
from dmin.diffusion import Stratified
from dmin.diffusion.inputs import NoisedBatch
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


class InTurns:
    """Runs each pass both ways, one straight after the other, and adds up their processor time.

    So whatever the machine does meanwhile falls on both. Which goes first changes each time.

    Args:
        collector: whose passes are run.
        known: the orders of rows, all found before.

        first: which way goes first in the first pass.

    Attributes:
        seconds: of the passes without any check, and with all.
        guard: the checks.
    """

    def __init__(self, collector: Collector, known: Ownership, first: int) -> None:
        self.collector, self.known = collector, known
        self.guard = Guard(collector, Ownership())
        self.seconds = [0.0, 0.0]
        self._passes = first

    def run(self, batch: NoisedBatch) -> Features:
        """Return the features of a pass with all checks."""
        self._passes += 1
        for checked in (0, 1) if self._passes % 2 else (1, 0):
            start = time.process_time()
            if checked:
                found = self.guard.run(batch)
            else:
                self.collector.run(batch, self.known)
            self.seconds[checked] += time.process_time() - start
        return found


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
    # Warms up, and finds out what is known from here on.
    collector.passes(inputs, pairs, InTurns(collector, known, 0).run)
    # Collecting garbage among what was imported takes as long as four passes, in either way.
    gc.collect()
    gc.freeze()
    ratios, plain, probes, guards = [], [], [], []
    for turn in range(turns):
        both = InTurns(collector, known, turn)
        collector.passes(inputs, pairs, both.run)
        ratios.append(both.seconds[1] / both.seconds[0])
        plain.append(both.seconds[0])
        probes.append(both.guard.ownership.seconds)
        guards.append(both.guard.seconds)
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
    parser.add_argument("--passes", type=int, default=200)
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
