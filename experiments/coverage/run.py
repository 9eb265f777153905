"""Do error bars hold the truth 95 times in 100? A thousand sketches and draws of noise say.

python experiments/coverage/run.py     # resumable: what is measured lies in outputs/coverage
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from dmin import DMin, Examples, FeatureSet, GradientCollector
from dmin.attribution import Method
from dmin.attribution.confidence import SURE, noise_deviations, sketch_deviations, spread, widened
from dmin.cli.config.groups import config_directory
from dmin.collect import predict_trainer
from dmin.data.digits import Digits
from dmin.diffusion import Explicit, SharedNoise
from dmin.evaluation.metrics import bootstrap
from dmin.models.toy.mlp import MLP
from dmin.queries import Planted
from dmin.runtime.escape import write_csv
from dmin.sketches import FullGradient
from dmin.store import Layout
from dmin.train import fit_trainer, train
from experiments.record import recorded

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
EXAMPLES, QUERIES, CANDIDATES, FIRST = 24, 12, 8, 3
TIMES = (500, 200, 80, 30, 10)  # little noise, where gradients differ
STEPS, DRAWS, REDRAWS, DIM = len(TIMES), 64, 1000, 256
METHODS = ("dmin", "dmin_unnormalised", "grad_dot", "grad_cos")
FAMILIES = ("auto", "block_cyclic", "tensor_sketch", "factored")
SETTINGS = {"auto": {"from_size": 1024}}  # so that both of its maps are at work at this size
SETTINGS |= {name: {**SETTINGS.get(name, {}), "block": 64} for name in FAMILIES[:3]}
HIGH = 0.8  # mean cosine over timesteps, of full gradients


@dataclass(frozen=True)
class Rows:
    """Full gradients of some examples, float32 ``[n, D, T, P]``, and their losses."""

    full: Tensor
    losses: np.ndarray

    def of(self, draws: np.ndarray, chosen: Sequence[int] | None = None) -> Rows:
        """Return some draws of each timestep, ``[D', T]``, of all examples or chosen ones."""
        times, rows = np.arange(self.full.shape[2]), np.arange(len(self.full))
        rows = (rows if chosen is None else np.asarray(chosen))[:, None, None]
        return Rows(self.full[rows, draws, times], self.losses[rows, draws, times])


class AsStore(SimpleNamespace):
    """What methods ask of a store."""

    def __len__(self) -> int:
        return len(self.ids)


class InMemory(FeatureSet):
    """One side of a comparison from rows that lie in memory."""

    def __init__(self, name: str, rows: Tensor, norms: Tensor, losses: np.ndarray, family: str):
        draws, steps, dim = rows.shape[1:]
        times = tuple(float(t) for t in range(steps))
        store = AsStore(
            layout=Layout(("loss",), draws, times, ("model",), dim),
            ids=[f"{name}-{row}" for row in range(len(rows))],
            manifest=SimpleNamespace(features={"sketch": {"family": family}, "noise": {}}),
            norms=lambda readout: norms[..., None].numpy(),
            rows=lambda readout, chosen: rows[chosen, :, :, None].numpy(),
            losses=lambda: losses,
        )
        super().__init__(store)


def whole(name: str, rows: Rows) -> InMemory:
    """Return a side of full gradients."""
    norms = rows.full.norm(dim=-1)
    return InMemory(name, rows.full / norms[..., None], norms, rows.losses, "none")


def sketched(name: str, rows: Rows, family: str, seed: int, parameters) -> InMemory:
    """Return a side of sketches."""
    settings = yaml.safe_load((config_directory() / f"sketch/{family}.yaml").read_text())
    settings |= {"dim": DIM, "seed": seed, **SETTINGS.get(family, {})}
    sketch = instantiate(settings).bind(parameters)
    flat, gradients, start = rows.full.flatten(0, 2), {}, 0
    for entry in parameters.entries:
        end = start + int(np.prod(entry.shape))
        gradients[entry.name] = flat[:, start:end].reshape(-1, *entry.shape)
        start = end
    values = sketch.of(gradients)[:, 0].view(*rows.full.shape[:3], -1)
    norms = (rows.full if sketch.norm_kind == "exact" else values).norm(dim=-1)
    return InMemory(name, values / norms[..., None], norms, rows.losses, family)


@cache
def shipped(name: str) -> Method:
    """Return a method as its YAML has it."""
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return instantiate(compose(f"method/{name}").method)


def gradients(place: Path) -> tuple[Rows, Rows, object]:
    """Return full gradients of training examples and queries, and the parameters."""
    digits = Digits("train")
    build = partial(MLP.small, width=48, depth=2, embedding=16)
    if not (place / "model").is_dir():
        trainer = fit_trainer(accelerator="cpu")
        model = train(build, digits, steps=1000, learning_rate=3e-3, trainer=trainer)
        model.save_pretrained(place / "model")
    model = MLP.from_pretrained(place / "model")
    examples = Examples([digits[i] for i in range(EXAMPLES)])
    held = Digits("heldout")
    copies = Planted("noisy", count=QUERIES // 2, noise=0.2).plant(examples)
    asked = Examples([side[i] for side in (held, copies) for i in range(QUERIES // 2)])
    noise = SharedNoise(draws=DRAWS)
    collector = GradientCollector(model, FullGradient(), Explicit(TIMES), noise)
    found = []
    for name, data in (("train", examples), ("queries", asked)):
        store = collector.collect(data, place / name, trainer=predict_trainer())
        rows = torch.from_numpy(store.features("loss"))[:, :, :, 0]
        norms = torch.from_numpy(store.norms("loss"))
        found.append(Rows(rows * norms, store.losses()))
    return found[0], found[1], collector.attributed


def scores(method: Method, queries: FeatureSet, side: FeatureSet) -> np.ndarray:
    """Return the scores of one query, ``[n]``."""
    asked = method.transform_query(queries.block([0], method.requires))
    every = side.block(range(len(side)), method.requires)
    return method.score(asked, every)[0].double().numpy()


class World:
    """Gradients, the examples that each query is asked about, and scores of full gradients."""

    def __init__(self, place: Path, redraws: int) -> None:
        self.place, self.redraws = place, redraws
        self.train, self.queries, self.parameters = gradients(place)
        pool = np.arange(DRAWS)[:, None].repeat(STEPS, 1)
        some = whole("queries", self.queries.of(pool[:8])), whole("train", self.train.of(pool[:8]))
        asked = DMin().transform_query(some[0].block(range(QUERIES), DMin.requires))
        every = asked.scores(some[1].block(range(EXAMPLES), DMin.requires)).numpy() / STEPS
        order, half = np.argsort(-every, axis=1), CANDIDATES // 2
        spaced = np.linspace(half, EXAMPLES - 1, half).astype(int)  # others, evenly
        self.rows = np.concatenate([order[:, :half], order[:, spaced]], axis=1)
        self.cosine = np.take_along_axis(every, self.rows, axis=1)
        generator = np.random.default_rng(0)
        self.draws = [generator.permuted(pool, axis=0)[:2] for _ in range(redraws)]

    def asked(self, redraw: int) -> tuple[tuple[str, Rows], tuple[str, Rows]]:
        """Return the query of a redraw and the examples that it is asked about, with names."""
        query, draws = redraw % QUERIES, self.draws[redraw]
        examples = self.train.of(draws, self.rows[query])
        return ("queries", self.queries.of(draws, [query])), ("train", examples)

    def full(self) -> dict[str, np.ndarray]:
        """Return scores of full gradients with the draws of each redraw, ``[R, n]`` a method."""
        found = {name: np.zeros((self.redraws, CANDIDATES)) for name in METHODS}
        for redraw in range(self.redraws):
            sides = [whole(*each) for each in self.asked(redraw)]
            for name, method in fitted(sides[1]):
                found[name][redraw] = scores(method, *sides)
        return found

    def measured(self, family: str) -> dict[str, np.ndarray]:
        """Return scores, bars and stability of every redraw, ``[M, R, n]``."""
        shape, rows = (len(METHODS), self.redraws, CANDIDATES), np.arange(CANDIDATES)
        found = {name: np.zeros(shape) for name in ("score", "sketch", "total", "stable")}
        generator, start = np.random.default_rng(1), time.process_time()
        for redraw in range(self.redraws):
            named = self.asked(redraw)
            sides = [sketched(*one, family, redraw, self.parameters) for one in named]
            for m, (_, method) in enumerate(fitted(sides[1])):
                mine = scores(method, *sides)
                of_map = sketch_deviations(*sides, method, 0, rows)
                of_noise = noise_deviations(*sides, method, 0, rows, mine, seed=redraw)
                both = widened([of_map, of_noise])
                again = mine + generator.normal(size=(200, len(both))) @ both
                least = np.sort(again, axis=1)[:, -FIRST, None]
                found["score"][m, redraw], found["total"][m, redraw] = mine, spread(both)
                found["sketch"][m, redraw] = spread(widened([of_map]))
                found["stable"][m, redraw] = (again >= least).mean(0)
            if redraw % 100 == 99:
                print(f"{family}: {redraw + 1}, {time.process_time() - start:.0f} s", flush=True)
        return found


def fitted(side: FeatureSet) -> Iterator[tuple[str, Method]]:
    """Yield the methods, each fitted to a side."""
    for name in METHODS:
        method = copy.copy(shipped(name))
        method.fit(side)
        yield name, method


def over_draws(full: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return, for each redraw, the mean score of the same query over all others, ``[R, n]``."""
    found = np.zeros_like(full)
    for q in range(QUERIES):
        own = full[query == q]
        found[query == q] = (own.sum(0) - own) / (len(own) - 1)
    return found


def kept(file: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return what a file has, or make it."""
    if not file.is_file():
        np.savez(file, **make())
    return dict(np.load(file))


def report(
    found: dict[str, dict[str, np.ndarray]], full: dict[str, np.ndarray], world: World
) -> None:
    """Write the coverage of each cell, the calibration of stability, and the picture."""
    lines, sure = [], []
    query = np.arange(world.redraws) % QUERIES
    high = world.cosine[query] >= HIGH  # [R, n]
    for family, of in found.items():
        for m, name in enumerate(METHODS):
            truths = {"sketch": full[name], "total": over_draws(full[name], query)}
            for bar, truth in truths.items():
                error = np.abs(of["score"][m] - truth)
                inside = error <= SURE * of[bar][m]
                for cosines, chosen in (("high", high), ("low", ~high)):
                    cover = bootstrap(by_query(inside, chosen, query))
                    ratio = np.median(of[bar][m][chosen]) / np.sqrt(np.square(error[chosen]).mean())
                    told = {"bar": bar, "method": name, "sketch": family, "cosines": cosines}
                    figures = {"coverage": cover.mean, "low": cover.low, "high": cover.high}
                    told |= {what: f"{value:.3f}" for what, value in figures.items()}
                    told |= {"bar over error": f"{ratio:.2f}"}
                    lines.append(told | {"redraws": int(chosen.any(1).sum())})
            sure += calibration(name, family, of["stable"][m], truths["total"])
    write_csv(HERE / "coverage.csv", lines)
    write_csv(HERE / "stability.csv", sure)
    write_csv(HERE / "shown.csv", shown(lines))
    picture(lines)


def shown(lines: list[dict[str, object]]) -> list[dict[str, str]]:
    """Return the bars that hold, of high and low cosines; a total only where its sketch does."""
    cells: dict[tuple[str, str, str], list[bool]] = {}
    for line in lines:
        key = str(line["bar"]), str(line["method"]), str(line["sketch"])
        cells.setdefault(key, []).append(0.92 <= float(str(line["coverage"])) <= 0.98)
    rows: dict[tuple[str, str], list[str]] = {}
    for (bar, method, family), holds in cells.items():
        if all(holds) and all(cells["sketch", method, family]):
            rows.setdefault((bar, method), []).append(family)
    return [
        {"bar": bar, "method": method, "sketches": ", ".join(sorted(families))}
        for (bar, method), families in sorted(rows.items())
    ]


def by_query(inside: np.ndarray, chosen: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return the share inside of each query that has any chosen, ``[Q']``."""
    sums = [(inside & chosen)[query == q].sum() for q in range(QUERIES)]
    counts = [chosen[query == q].sum() for q in range(QUERIES)]
    return np.array([a / b for a, b in zip(sums, counts, strict=True) if b])


def calibration(
    name: str, family: str, stable: np.ndarray, truth: np.ndarray
) -> list[dict[str, object]]:
    """Return how often examples of some stability are among the first of the truth."""
    first = truth >= np.sort(truth, axis=1)[:, -FIRST, None]
    ends = (0.0, 0.1, 0.5, 0.9, 0.99, 1.01)
    lines = []
    for low, end in pairwise(ends):
        there = (stable >= low) & (stable < end)
        if there.sum() >= 100:
            lines.append(
                {
                    "method": name,
                    "sketch": family,
                    "stability": f"{low:g} to {min(end, 1):g}",
                    "said": f"{stable[there].mean():.3f}",
                    "found": f"{first[there].mean():.3f}",
                    "examples": int(there.sum()),
                }
            )
    return lines


def picture(lines: list[dict[str, object]]) -> None:
    """Draw the coverage of each cell."""
    figure, panes = plt.subplots(1, 2, figsize=(12, 4.5), dpi=120, sharey=True)
    for pane, bar in zip(panes, ("sketch", "total"), strict=True):
        pane.axhspan(0.92, 0.98, color="#dddddd")
        for number, family in enumerate(dict.fromkeys(line["sketch"] for line in lines)):
            for cosine, marker in (("high", "^"), ("low", "v")):
                cells = [x for x in lines if (x["bar"], x["sketch"]) == (bar, family)]
                cells = [x for x in cells if x["cosines"] == cosine]
                x = [METHODS.index(c["method"]) + (number - 2) / 10 for c in cells]
                y = [float(c["coverage"]) for c in cells]
                label = family if cosine == "high" else None
                pane.plot(x, y, marker, color=f"C{number}", ms=4, ls="", label=label)
        pane.set_xticks(range(len(METHODS)), METHODS, rotation=60, ha="right", fontsize=8)
        pane.set_title(f"{bar}: truths inside ±1.96 errors (▲ cosines from {HIGH:g}, ▼ below)")
        pane.set_ylim(0.4, 1.01)
    panes[0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(HERE / "coverage.png")


def main() -> None:
    """Measure, and write tables and picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("outputs/coverage"))
    parser.add_argument("--redraws", type=int, default=REDRAWS)
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    world = World(options.cache, options.redraws)
    full = kept(options.cache / "full.npz", world.full)
    found = {
        family: kept(options.cache / f"{family}.npz", partial(world.measured, family))
        for family in options.families
    }
    report(found, full, world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with recorded(__file__, redraws=REDRAWS, seeds=[0, 1]):
        main()
