"""LDS, counterfactual removal and detection of every method, from one store of digits.

    python experiments/lds/run.py            # quick form
    python experiments/lds/run.py --full

Everything that is trained or collected is kept under --cache and found again.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch
from report import plot_path, plot_table, table
from world import READOUTS, Size, World

from dmin.attribution import (
    DAS,
    DTRAK,
    SSIM,
    TRAK,
    DataInf,
    DMin,
    GaussianKernel,
    GradCos,
    GradDot,
    Method,
    PixelCosine,
    PixelL2,
    Random,
    RelativeIF,
    RenormalisedIF,
    Side,
    Spectral,
    SpectralEnergy,
    ZSum,
)
from dmin.evaluation import SameColumn, SameLabel
from dmin.evaluation.controls import popularity, soft_max, squared, top_only
from dmin.evaluation.lds import Resamples, ceiling, interval, lds, membership
from dmin.evaluation.metrics import bootstrap, measure
from dmin.evaluation.removal import mean_rise, without_random, without_top

ALPHAS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
POWERS = (0.5, 1.0, 2.0)
FIXED = {
    "random": Random(),
    "pixel_l2": PixelL2(),
    "pixel_cosine": PixelCosine(),
    "gaussian_kernel": GaussianKernel(),
    "ssim": SSIM(),
    "grad_dot": GradDot(),
    "grad_cos": GradCos(),
    "dmin": DMin(),
    "datainf": DataInf(),
}
TUNED = {
    "trak": TRAK(),
    "relative_if": RelativeIF(),
    "renormalised_if": RenormalisedIF(),
    "d_trak": DTRAK(),
    "das": DAS(),
    "spectral": Spectral(),
    "spectral_energy": SpectralEnergy(),
    "z_sum": ZSum(),
}
# † marks the point chosen by LDS on the tune queries; without it, by their foreign mAP.
REMOVED = (
    *("pixel_l2", "grad_dot", "grad_cos", "dmin", "datainf", "trak †", "relative_if †"),
    *("d_trak †", "das", "das †", "spectral", "spectral †", "spectral_energy †", "z_sum †"),
    *("dmin (untrained)", "spectral_energy"),
)
KINDS = ("generated", "heldout")
TRANSPOSED = ("tune", "test")


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


def walk(scorer: Scorer, measures: Measures, log) -> tuple[dict, list[dict]]:
    """Fit each tuned method once, walk its path, and choose its point on the tune queries."""
    chosen, path = {}, []
    for name, method in TUNED.items():
        start = time.perf_counter()
        method.fit(scorer.train)
        fitted = time.perf_counter() - start
        for p in POWERS if isinstance(method, Spectral) else (1.0,):
            for alpha in ALPHAS:
                point = method.at(alpha, p) if isinstance(method, Spectral) else method
                point.alpha = alpha
                scores = scorer(point)
                criteria = {
                    name: measures.foreign(scores, "tune").mean(),
                    f"{name} †": measures.lds(scores, "tune").mean(),
                }
                dimension = point.curvature.effective_dimension(point.damping).mean()
                path.append(
                    {
                        "method": name,
                        "p": p,
                        "alpha": alpha,
                        "dimension": round(float(dimension), 1),
                    }
                    | {f"{k} mAP": round(measures.foreign(scores, k).mean(), 4) for k in TRANSPOSED}
                    | {
                        f"LDS {k}": round(measures.lds(scores, k).mean(), 4)
                        for k in (*KINDS, "tune")
                    }
                    | {f"P@10 {k}": round(measures.label(scores, k).mean(), 4) for k in KINDS}
                )
                for row, value in criteria.items():
                    if row not in chosen or value > chosen[row]["value"]:
                        chosen[row] = {"value": value, "alpha": alpha, "p": p, "scores": scores}
        for row in criteria:
            chosen[row]["fit seconds"] = fitted
        log(name, 1, 1)
    return chosen, path


def all_scores(world: World, scorer: Scorer, chosen: dict) -> dict[str, np.ndarray]:
    """Return score matrices: fixed and tuned methods, then their controls."""
    scores = {}
    for name, method in FIXED.items():
        method.fit(scorer.train)
        scores[name] = scorer(method)
    scores |= {name: found["scores"] for name, found in chosen.items()}
    blind = Scorer(*world.sides(world.untrained, ("loss",)))
    energy = {k: chosen["spectral_energy †"][k] for k in ("alpha", "p")}
    for name, method in (("dmin", DMin()), ("spectral_energy †", SpectralEnergy(**energy))):
        method.fit(blind.train)
        scores[f"{name} (untrained)"] = blind(method)
    for name in ("pixel_l2", "dmin", "spectral †"):
        scores[f"{name}, squared"] = squared(scores[name])
        scores[f"{name}, soft-max"] = soft_max(scores[name])
        scores[f"{name}, top 50"] = top_only(scores[name], 50)
    return scores


def removal(world: World, scores: dict, log) -> dict:
    """Return, by (method, kind), the percent by which removing the top k raises the loss."""
    size, n = world.size, len(world.train)
    each = size.removal_queries
    asked = np.concatenate([world.rows[k][:: len(world.rows[k]) // each][:each] for k in KINDS])
    names = [name for name in REMOVED if name in scores]
    sets = [s for name in names for s in without_top(scores[name][asked], size.removal_k)]
    random = without_random(n, size.removal_k, size.random_removals, seed=1)
    losses, others = [], []

    def report(done: int, total: int) -> None:
        log("removal", done, total)

    for seed in range(10, 10 + size.removal_seeds):
        found = world.losses(
            world.ensemble.train([*sets, *random], seed, lambda d, t: log("removal", d, t))
        )
        losses.append(found[: len(sets)])
        others.append(found[len(sets) :])
    lost, base = np.mean(losses, 0), np.mean(others, 0)[:, asked]
    mine = np.arange(len(asked))
    results = {}
    for number, name in enumerate(names):
        own = lost[number * len(asked) + mine, asked]
        for part, kind in enumerate(KINDS):
            one = slice(part * size.removal_queries, (part + 1) * size.removal_queries)
            results[name, kind] = mean_rise(own[one], base[:, one])
    return results


def results_of(measures: Measures, scores: dict, removed: dict) -> list[dict]:
    """Return one tidy row a method, kind of query and metric."""
    rows = []

    def add(method, kind, metric, estimate, note=""):
        numbers = {name: round(getattr(estimate, name), 4) for name in ("mean", "low", "high")}
        rows.append({"method": method, "queries": kind, "metric": metric, **numbers, "note": note})

    reference = {kind: measures.resampled(scores["dmin"], kind) for kind in KINDS}
    best = {kind: ceiling(measures.losses[:, :, measures.rows[kind]]) for kind in KINDS}
    for kind in KINDS:
        add("ceiling", kind, "LDS", bootstrap(best[kind].attainable), "attainable")
        add("one seed", kind, "LDS", bootstrap(best[kind].one_seed), "against the others")
    for name, found in scores.items():
        for kind in KINDS:
            each, resampled = measures.lds(found, kind), measures.resampled(found, kind)
            add(name, kind, "LDS", interval(each.mean(), resampled))
            dmin = measures.lds(scores["dmin"], kind).mean()
            add(name, kind, "LDS − DMin", interval(each.mean() - dmin, resampled - reference[kind]))
            add(name, kind, "P@10", bootstrap(measures.label(found, kind)))
            if (name, kind) in removed:
                add(name, kind, "removal %", removed[name, kind])
            alike = popularity(found[measures.rows[kind]])
            add(name, kind, "popularity", interval(alike, np.array([alike])))
        add(name, "test", "foreign mAP", bootstrap(measures.foreign(found, "test")))
        add(name, "noisy", "recall@1", bootstrap(measures.copy(found)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path("outputs/lds"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = Size(128, 4, 25, 50, 2, 24, 4096) if options.full else Size()
    out = Path(__file__).parent / ("full" if options.full else "quick")
    out.mkdir(exist_ok=True)
    start = time.perf_counter()

    def log(what: str, done: int, total: int) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {what}  {done}/{total}", flush=True)

    world = World(size, options.cache)
    queries, train = world.sides(world.model, READOUTS)
    log("stores", 1, 1)
    subsets, losses = world.retrained(log)
    scorer, measures = Scorer(queries, train), Measures(world, queries, train, subsets, losses)
    chosen, path = walk(scorer, measures, log)
    scores = all_scores(world, scorer, chosen)
    log("scores", len(scores), len(scores))
    removed = removal(world, scores, log)
    rows = results_of(measures, scores, removed)
    for name, found in (("results.csv", rows), ("path.csv", path)):
        with (out / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    settings = {n: (c["alpha"], c["p"], c["fit seconds"]) for n, c in chosen.items()}
    (out / "table.md").write_text(table(rows, settings))
    plot_table(rows, out / "lds.png")
    plot_path(path, rows, out / "path.png")
    log("done", 1, 1)


if __name__ == "__main__":
    main()
