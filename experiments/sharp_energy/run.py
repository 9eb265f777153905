"""One setting for ranking and for foretelling: chosen on tune queries, then measured on others.

    python experiments/sharp_energy/run.py

What is trained or collected is kept under --cache and found again: a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path

import matplotlib
import numpy as np
import torch
from world import READOUTS, Size, World

from dmin.attribution import DAS, DMin, Method, PixelL2, SharpEnergy, Side, SpectralEnergy
from dmin.evaluation import SameColumn, SameLabel
from dmin.evaluation.lds import Resamples, interval, lds, membership
from dmin.evaluation.metrics import bootstrap, measure
from dmin.evaluation.removal import mean_rise, without_random, without_top
from dmin.record import recorded

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
KINDS = ("generated", "heldout")
ALPHAS, POWERS = (10.0, 30.0, 100.0, 300.0, 1000.0), (1.0, 2.0, 3.0)
NORMS, SHARPNESS = (0.0, 0.5, 1.0), (1.0, 1.5, 2.0, 2.5)
DAS_ALPHAS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0)
REMOVAL_QUERIES, REMOVAL_K = 8, 50


class Scorer:
    """Scores of all queries by a method that may be fitted already."""

    def __init__(self, queries: Side, train: Side) -> None:
        self.queries, self.train = queries, train
        self.blocks: dict = {}

    def __call__(self, method: Method) -> np.ndarray:
        needs = method.requires
        if needs not in self.blocks:
            asked = self.queries.block(np.arange(len(self.queries)), needs)
            self.blocks[needs] = asked, list(self.train.blocks(needs))
        asked, train = self.blocks[needs]
        ready = method.transform_query(asked)
        return torch.cat([method.score(ready, block) for block in train], 1).numpy()


class Measures:
    """What a score matrix ``[all queries, N]`` is worth, by every ground truth but removal."""

    def __init__(self, world: World, queries: Side, train: Side, subsets, losses) -> None:
        self.rows, self.losses = world.rows, losses
        self.members = membership(subsets, len(world.train))
        truths = {"label": SameLabel(), "source": SameColumn("source")}
        self.relevant = {k: t.relevant(queries.store, train.store) for k, t in truths.items()}
        noisy = world.rows["noisy"]
        sources = [train.store.index(queries.store.metadata[q]["source_id"]) for q in noisy]
        self.copies = np.zeros((len(noisy), len(train)), dtype=bool)
        self.copies[np.arange(len(noisy)), sources] = True
        self.resamples = {
            kind: Resamples(len(subsets), len(world.rows[kind]), world.size.resamples)
            for kind in KINDS
        }

    def lds(self, scores: np.ndarray, kind: str) -> np.ndarray:
        rows = self.rows[kind]
        return lds(scores[rows], self.members, self.losses.mean(0)[:, rows])

    def resampled(self, scores: np.ndarray, kind: str) -> np.ndarray:
        rows = self.rows[kind]
        return self.resamples[kind].means(scores[rows], self.members, self.losses.mean(0)[:, rows])

    def foreign(self, scores: np.ndarray, role: str) -> np.ndarray:
        rows = self.rows[role]
        return measure("mAP", scores[rows], self.relevant["source"][rows])

    def label(self, scores: np.ndarray, kind: str) -> np.ndarray:
        rows = self.rows[kind]
        return measure("precision@10", scores[rows], self.relevant["label"][rows])

    def copy(self, scores: np.ndarray) -> np.ndarray:
        return measure("recall@1", scores[self.rows["noisy"]], self.copies)


def chosen(scorer: Scorer, measures: Measures, log) -> tuple[dict[str, Method], list[dict]]:
    """Return DAS at its best for each purpose, and the whole family on the tune queries."""
    grid, best = [], {}
    energy = SharpEnergy()
    energy.fit(scorer.train)
    for alpha, p in itertools.product(ALPHAS, POWERS):
        for norms in NORMS:
            point = energy.at(alpha, p)
            point.norms, point.sharpness = norms, 1.0
            plain = scorer(point)
            for sharpness in SHARPNESS:
                scores = plain**sharpness
                row = {"alpha": alpha, "p": p, "norms": norms, "sharpness": sharpness}
                row["LDS tune"] = round(measures.lds(scores, "tune").mean(), 4)
                row["mAP tune"] = round(measures.foreign(scores, "tune").mean(), 4)
                row["copies"] = round(measures.copy(scores).mean(), 4)
                grid.append(row)
        log(f"α = {alpha:g}, p = {p:g}")
    das = DAS()
    das.fit(scorer.train)
    for alpha in DAS_ALPHAS:
        das.alpha = alpha
        scores = scorer(das)
        for name, value in (
            ("das, by LDS", measures.lds(scores, "tune").mean()),
            ("das, by mAP", measures.foreign(scores, "tune").mean()),
        ):
            if name not in best or value > best[name][0]:
                best[name] = value, alpha, scores
    return {name: found[1:] for name, found in best.items()}, grid


def rises(world: World, scores: dict[str, np.ndarray], log) -> dict:
    """Return, by (method, kind), the percent by which removing the top 50 raises the loss."""
    each = REMOVAL_QUERIES
    asked = np.concatenate([world.rows[k][:: len(world.rows[k]) // each][:each] for k in KINDS])
    random = without_random(len(world.train), REMOVAL_K, 24, seed=1)
    base = world.losses(random, 10, log)[:, asked]
    found = {}
    for name, matrix in scores.items():
        sets = without_top(matrix[asked], REMOVAL_K)
        lost = world.losses(sets, 10, log)[np.arange(len(asked)), asked]
        for number, kind in enumerate(KINDS):
            part = slice(number * each, (number + 1) * each)
            found[name, kind] = mean_rise(lost[part], base[:, part])
        log(f"removal, {name}")
    return found


def plot(grid: list[dict], rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), constrained_layout=True)
    for sharpness, colour in zip(
        SHARPNESS, plt.get_cmap("viridis")([0, 0.3, 0.6, 0.9]), strict=True
    ):
        part = [r for r in grid if r["sharpness"] == sharpness]
        axes[0].scatter(
            [r["LDS tune"] for r in part],
            [r["mAP tune"] for r in part],
            s=[10 + 40 * r["norms"] for r in part],
            color=colour,
            label=f"s = {sharpness:g}",
        )
    axes[0].set(xlabel="LDS, tune queries", ylabel="foreign mAP, tune queries")
    axes[0].set_title("every setting (size: γ = 0, ½, 1)")
    axes[0].legend(fontsize=8)
    cells = {(r["method"], r["metric"]): r for r in rows}
    for name in dict.fromkeys(r["method"] for r in rows):
        x, y = cells[name, "LDS generated"], cells[name, "foreign mAP"]
        axes[1].errorbar(
            x["mean"],
            y["mean"],
            xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
            yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]],
            marker="o",
            capsize=2,
            label=name,
        )
    axes[1].set(xlabel="LDS, generated queries", ylabel="foreign mAP, test queries")
    axes[1].set_title("on queries that nothing was chosen on, 95 %")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("outputs/sharp_energy"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    def log(*what: object) -> None:
        print(*what, flush=True)

    world = World(Size(), options.cache)
    queries, train = world.sides(world.model, READOUTS)
    subsets, losses = world.retrained(log)
    scorer, measures = Scorer(queries, train), Measures(world, queries, train, subsets, losses)
    best, grid = chosen(scorer, measures, log)
    scores = {name: matrix for name, (_, matrix) in best.items()}
    fixed: dict[str, Method] = {
        "dmin": DMin(),
        "pixel_l2": PixelL2(),
        "spectral_energy": SpectralEnergy(),
        "sharp_energy": SharpEnergy(),
        "sharp_energy, γ = 1": SharpEnergy(norms=1.0),
    }
    for name, method in fixed.items():
        method.fit(train)
        scores[name] = scorer(method)
    removed, rows = rises(world, scores, log), []
    mine = {kind: measures.resampled(scores["sharp_energy"], kind) for kind in KINDS}

    def add(method: str, metric: str, estimate) -> None:
        numbers = {name: round(getattr(estimate, name), 4) for name in ("mean", "low", "high")}
        alpha = best[method][0] if method in best else ""
        rows.append({"method": method, "alpha": alpha, "metric": metric, **numbers})

    for name, matrix in scores.items():
        for kind in KINDS:
            each, resampled = measures.lds(matrix, kind), measures.resampled(matrix, kind)
            add(name, f"LDS {kind}", interval(each.mean(), resampled))
            difference = each.mean() - measures.lds(scores["sharp_energy"], kind).mean()
            add(name, f"LDS {kind} − sharp", interval(difference, resampled - mine[kind]))
            add(name, f"removal % {kind}", removed[name, kind])
        add(name, "foreign mAP", bootstrap(measures.foreign(matrix, "test")))
        add(name, "noisy copies", bootstrap(measures.copy(matrix)))
        add(name, "P@10 by label", bootstrap(measures.label(matrix, "generated")))
    for name, found in (("grid.csv", grid), ("results.csv", rows)):
        with (HERE / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    plot(grid, rows, HERE / "results.png")


if __name__ == "__main__":
    with recorded(__file__, seeds={"model": 1000, "retrained": [0, 1], "noise": 0}):
        main()
