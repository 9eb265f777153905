"""What is behind one half of a picture? Pairs of digits, asked about by their left or right digit.

python experiments/parts/run.py
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import yaml
from hydra.utils import instantiate

from dmin import Example, Examples, FeatureSet, GradientCollector, retrieve
from dmin.collect import predict_trainer
from dmin.data.digits import Digits
from dmin.data.part import dimmed
from dmin.diffusion import SharedNoise, Stratified
from dmin.evaluation.metrics import bootstrap
from dmin.gallery.pictures import fit, to_picture
from dmin.models import DDPM
from dmin.runtime.escape import write_csv
from dmin.sketches import Auto
from dmin.train import fit_trainer, train
from experiments.record import recorded

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PAIRS, QUERIES, K = 1000, 100, 10
METHODS = ("dmin", "sharp_energy")
PARTS = {"whole": None, "left": slice(0, 8), "right": slice(8, 16)}
NETWORK = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
}


def pairs(split: str, count: int, seed: int) -> list[Example]:
    """Return pictures of two digits side by side, drawn without regard to each other."""
    digits = Digits(split)
    drawn = np.random.default_rng(seed).integers(0, len(digits), (count, 2))
    found = []
    for number, (a, b) in enumerate(drawn.tolist()):
        left, right = digits[a], digits[b]
        facts = {"left": left.label, "right": right.label}
        image = torch.cat([left.image, right.image], 2)
        found.append(Example(f"{split}-{number:04d}", image, metadata=facts))
    return found


def asked(examples: list[Example], part: slice | None) -> Examples:
    """Return queries about a part of each picture."""
    if part is None:
        return Examples(examples)
    mask = torch.zeros_like(examples[0].image)
    mask[..., part] = 1 / ((part.stop - part.start) / mask.shape[2])
    return Examples([replace(each, mask=mask) for each in examples])


class World:
    """A model of pictures, the store of its training pictures, and questions."""

    def __init__(self, pictures: list[Example], place: Path, steps: int) -> None:
        height, width = pictures[0].image.shape[1:]
        build = partial(DDPM.build, {**NETWORK, "sample_size": [height, width]}, SCHEDULER)
        self.data, self.place = Examples(pictures), place
        model = place / "model"
        if model.is_dir():
            self.model = DDPM.from_pretrained(model)
        elif steps:
            trainer = fit_trainer(accelerator="cpu")
            self.model = train(build, self.data, steps=steps, batch_size=64, trainer=trainer)
            self.model.save_pretrained(model)
        else:
            torch.manual_seed(0)
            self.model = build().eval()
        self.collector = GradientCollector(self.model, Auto(4096), Stratified(10), SharedNoise())
        self.train = FeatureSet(self.collect(self.data, "train"), self.data)

    def collect(self, data: Examples, name: str):
        """Return the store of some pictures."""
        return self.collector.collect(data, self.place / name, trainer=predict_trainer())

    def answers(self, name: str, queries: Examples, method: str) -> np.ndarray:
        """Return the rows of the first K training pictures of each query."""
        side = FeatureSet(self.collect(queries, name), queries)
        settings = yaml.safe_load((HERE.parents[1] / f"conf/method/{method}.yaml").read_text())
        return retrieve(side, self.train, instantiate(settings), K).train_rows


def by_pixels(queries: list[Example], data: list[Example], part: slice | None) -> np.ndarray:
    """Return the training pictures with the nearest pixels in a part, ``[Q, K]``."""
    cut = slice(None) if part is None else part
    stacked = [
        torch.stack([e.image[..., cut] for e in those]).flatten(1) for those in (queries, data)
    ]
    return torch.cdist(*stacked).argsort(dim=1, stable=True)[:, :K].numpy()


def precision(rows: np.ndarray, queries: list[Example], data: list[Example], side: str):
    """Return P@K of one side's digit with its interval over queries, clusters of one draw each."""
    label = np.array([e.metadata[side] for e in data])
    wanted = np.array([e.metadata[side] for e in queries])
    return bootstrap((label[rows] == wanted[:, None]).mean(1))


def picture(queries: list[Example], data: list[Example], rows: dict[str, np.ndarray]) -> None:
    """Draw four queries, each asked about by either half, and what is found."""
    figure, grid = plt.subplots(4, 12, figsize=(12, 3.4), dpi=130)
    for row, at in enumerate((0, 1, 2, 3)):
        for block, side in enumerate(("left", "right")):
            query = asked([queries[at]], PARTS[side])[0]
            shown = [dimmed(query.image, query.mask), *(data[i].image for i in rows[side][at][:5])]
            for column, image in enumerate(shown):
                axes = grid[row, 6 * block + column]
                axes.imshow(np.asarray(fit(to_picture(image.numpy(), ""), 96)), cmap="gray")
                axes.set_axis_off()
                if row == 0 and column == 0:
                    axes.set_title(f"asked: {side}", fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "results.png")


def main() -> None:
    """Measure, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("outputs/parts"))
    parser.add_argument("--steps", type=int, default=1500)
    settings = parser.parse_args()
    data, queries = pairs("train", PAIRS, 0), pairs("heldout", QUERIES, 1)
    lines = []

    def add(model: str, method: str, part: str, rows: np.ndarray) -> None:
        for side in ("left", "right"):
            found = precision(rows, queries, data, side)
            entry = {"model": model, "method": method, "asked": part, "digit": side}
            figures = {"P@10": found.mean, "low": found.low, "high": found.high}
            lines.append(entry | {name: f"{value:.3f}" for name, value in figures.items()})

    worlds = {"trained": settings.steps, "untrained": 0}
    for name, steps in worlds.items():
        world = World(data, settings.cache / name, steps)
        for method in METHODS:
            rows = {}
            for part, cut in PARTS.items():
                rows[part] = world.answers(f"asked-{part}", asked(queries, cut), method)
                add(name, method, part, rows[part])
            if (name, method) == ("trained", "dmin"):
                picture(queries, data, rows)
    for part, cut in PARTS.items():
        add("none", "pixels", part, by_pixels(queries, data, cut))
    # What each method reaches where the left digit is all there is.
    alone, about = ([_left(e) for e in those] for those in (data, queries))
    world = World(alone, settings.cache / "alone", settings.steps)
    for method in METHODS:
        rows = world.answers("asked", Examples(about), method)
        found = precision(rows, queries, data, "left")
        entry = {"model": "of the left digits alone", "method": method, "asked": "whole"}
        figures = {"P@10": found.mean, "low": found.low, "high": found.high}
        told = {name: f"{value:.3f}" for name, value in figures.items()}
        lines.append(entry | {"digit": "left"} | told)
    write_csv(HERE / "results.csv", lines)


def _left(example: Example) -> Example:
    return replace(example, image=example.image[..., :8].contiguous())


if __name__ == "__main__":
    with recorded(__file__, pairs=PAIRS, queries=QUERIES, seeds=[0, 1]):
        main()
