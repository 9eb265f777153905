"""Does a question about a concept find who taught it? Colours and shapes, some pairs never joined.

python experiments/concepts/run.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import yaml
from hydra.utils import instantiate
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dmin import Example, Examples, FeatureSet, GradientCollector
from dmin.attribution import score_matrix
from dmin.collect import predict_trainer
from dmin.data.base import collate
from dmin.data.shapes import Shapes
from dmin.diffusion import SharedNoise, Stratified
from dmin.diffusion.inputs import NoisedBatch, chosen_rows
from dmin.evaluation.metrics import bootstrap, measure
from dmin.gallery.pictures import fit, to_picture
from dmin.models import StableDiffusion3
from dmin.models.base import per_example_loss
from dmin.models.toy.small import TOKENS, stable_diffusion_3
from dmin.runtime.escape import write_csv
from dmin.sketches import Auto
from experiments.record import recorded

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
SEEDS, PICTURES, ASKED, SIZE = (1, 2, 3), 400, 5, 16
BATCH = 32
COLOURS, SHAPES = ("red", "yellow", "green", "blue"), ("circle", "square", "triangle", "cross")
PLAIN = [("plain", "large", background) for background in ("white", "grey", "black")]
METHODS, PIXELS = ("dmin", "spectral", "trak"), "pixel_l2"
KINDS = ("colour", "shape")
Pair = tuple[str, str]


class Row(NamedTuple):
    """Scores of queries about one pair."""

    model: str
    method: str
    question: str
    asked: str  # the attribute that is to be found; "whole" where the question names none
    pair: Pair
    scores: np.ndarray


def pictures(split: str, seed: int, pairs: Sequence[Pair], count: int) -> list[Example]:
    """Return large plain pictures of some pairs of colour and shape, captioned by both."""
    found, all_ = [], Shapes(split, 200_000, SIZE, seed=seed, minority=0)
    for number in range(len(all_)):
        facts = all_.facts(number).metadata
        pair = facts["colour"], facts["shape"]
        like = facts["texture"], facts["size"], facts["background"]
        if pair in pairs and like in PLAIN:
            found.append(replace(all_[number], caption=" ".join(pair)))
            if len(found) == count:
                break
    return found


def drawn(seed: int) -> tuple[list[Example], list[Pair]]:
    """Return training pictures, and the pairs that none of them joins, one of each colour."""
    draw = np.random.default_rng(seed)
    never = list(zip(COLOURS, draw.permutation(SHAPES).tolist(), strict=True))
    joined = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in never]
    found = []
    for example in pictures("train", seed, joined, PICTURES):
        words = example.caption.split()  # half of the captions name both, a quarter one of them
        said = {0: words[:1], 1: words[1:]}.get(int(draw.integers(4)), words)
        found.append(replace(example, caption=" ".join(said)))
    return found, never


def learn(model: StableDiffusion3, data: list[Example], steps: int) -> None:
    """Train on examples that are encoded once; averaged weights."""
    network = model.network.requires_grad_(True).train()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.0)
    with torch.no_grad():
        x0, condition = model.encode(collate(data))
    times = torch.tensor(model.timesteps)
    for step in range(steps):
        rows = torch.randint(len(x0), (BATCH,))
        t = times[torch.randint(len(times), (BATCH,))]
        batch = NoisedBatch(x0[rows], torch.randn_like(x0[rows]), t, chosen_rows(condition, rows))
        loss = per_example_loss(model.predict(*batch)).mean()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50, 3 - 3 * step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(network)
        if step % 100 == 99:
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    network.load_state_dict(average.module.state_dict())
    network.eval()


class World:
    """A model, the store of its training pictures, and questions."""

    def __init__(self, data: list[Example], place: Path, seed: int, steps: int) -> None:
        self.place, examples = place, Examples(data)
        words, kept = ["background", *COLOURS, *SHAPES], place / "model"
        if kept.is_dir():
            model = StableDiffusion3.from_pretrained(kept, max_sequence_length=TOKENS)
        else:
            torch.manual_seed(seed)
            model = stable_diffusion_3(words, SIZE, patch=4)
            learn(model, data, steps)
            model.save_pretrained(kept)
        self.pipeline = model.pipeline
        self.train = self.side(examples, "train")

    def side(self, data: Examples, name: str, without: str | None = None) -> FeatureSet:
        """Return the features of some pictures; of queries about the difference from a prompt."""
        options = {"max_sequence_length": TOKENS, "query_without": without}
        model = StableDiffusion3(self.pipeline, **options)
        collector = GradientCollector(model, Auto(4096), Stratified(5), SharedNoise())
        told = {"as_queries": name != "train", "trainer": predict_trainer()}
        return FeatureSet(collector.collect(data, self.place / name, **told), data)


def method(name: str):
    """Return a method with the settings of its YAML."""
    text = (HERE.parents[1] / f"conf/method/{name}.yaml").read_text()
    return instantiate(yaml.safe_load(text))


def answers(world: World, model: str, never: Sequence[Pair], asked: list[Example], methods):
    """Yield the scores of all questions about each pair that training never joined."""
    of = [tuple(e.caption.split()) for e in asked]
    whole = world.side(Examples(asked), "whole")
    for name in methods:
        scores = score_matrix(whole, world.train, method(name))
        for pair in never:
            mine = scores[[each == pair for each in of]]
            yield Row(model, name, "whole", "whole", pair, mine)
            for place, kind in enumerate(KINDS):
                # Pictures that share the other attribute: as `Pooled` has it, mean less mean.
                unlike = [each != pair and each[1 - place] == pair[1 - place] for each in of]
                against = mine.mean(0, keepdims=True) - scores[unlike].mean(0)
                yield Row(model, name, "against", kind, pair, against)
    for pair in never if PIXELS not in methods else ():
        these = Examples([e for e, each in zip(asked, of, strict=True) if each == pair])
        for place, kind in enumerate(KINDS):
            # Without the other word: "red circle" without "circle" asks for red.
            about = world.side(these, f"{kind}-{'-'.join(pair)}", pair[1 - place])
            for name in methods:
                found = score_matrix(about, world.train, method(name))
                yield Row(model, name, "concept", kind, pair, found)


def precision(row: Row, data: list[Example], kind: str) -> float:
    """Return P@10 of one attribute, averaged over the queries about a pair."""
    right = np.array([e.metadata[kind] == row.pair[KINDS.index(kind)] for e in data])
    relevant = np.broadcast_to(right, row.scores.shape)
    return float(measure("precision@10", row.scores, relevant).mean())


def main() -> None:
    """Measure, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("outputs/concepts"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    settings = parser.parse_args()
    found: dict[tuple[str, ...], list[float]] = {}  # of each pair of each seed
    every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    for seed in settings.seeds:
        data, never = drawn(seed)
        asked = [e for pair in every for e in pictures("heldout", seed, [pair], ASKED)]
        rows: list[Row] = []
        for name, steps in {"trained": settings.steps, "untrained": 0}.items():
            world = World(data, settings.cache / f"{seed}-{name}", seed, steps)
            rows += answers(world, name, never, asked, METHODS)
        rows += answers(world, "none", never, asked, [PIXELS])
        if seed == settings.seeds[0]:
            picture(rows, data, never[0], asked)
        for kind in KINDS:
            for row in rows:
                role = {"whole": "", kind: "asked"}.get(row.asked, "other")
                key = row.model, row.method, row.question, kind, role
                found.setdefault(key, []).append(precision(row, data, kind))
        save(found)


def save(found: dict[tuple[str, ...], list[float]]) -> None:
    """Write the table, with intervals over the pairs of all seeds."""
    lines = []
    for key, values in sorted(found.items()):
        known = bootstrap(np.array(values))
        # Shares: what a bootstrap's t puts beyond 0 and 1 is cut.
        figures = {"P@10": known.mean, "low": max(0, known.low), "high": min(1, known.high)}
        head = dict(zip(("model", "method", "question", "attribute", "role"), key, strict=True))
        told = {name: f"{value:.3f}" for name, value in figures.items()}
        lines.append({**head, **told, "pairs": len(values)})
    write_csv(HERE / "results.csv", lines)


def picture(rows: list[Row], data: list[Example], pair: Pair, asked: list[Example]) -> None:
    """Draw one query, and the first found by each question of the trained model's first method."""
    query = next(e for e in asked if e.caption == " ".join(pair))
    mine = [r for r in rows if (r.model, r.method, r.pair) == ("trained", METHODS[0], pair)]
    figure, grid = plt.subplots(len(mine), 9, figsize=(8, len(mine)), dpi=130)
    for axes, row in zip(grid, sorted(mine, key=lambda row: row.asked), strict=True):
        first = np.argsort(-row.scores[0], kind="stable")[:8]
        named = {"colour": pair[0], "shape": pair[1]}.get(row.asked, "")
        for place, image in enumerate([query.image, *(data[i].image for i in first)]):
            axes[place].imshow(np.asarray(fit(to_picture(image.numpy(), ""), 96)))
            axes[place].set_axis_off()
        axes[0].set_title(f"{row.question}\n{named}".strip(), fontsize=7, loc="left")
    figure.tight_layout()
    figure.savefig(HERE / "results.png")


if __name__ == "__main__":
    with recorded(__file__, pictures=PICTURES, asked=ASKED, seeds=list(SEEDS)):
        main()
