"""Does one damping serve several models? Every setting on the tune queries of four benchmarks.

    python experiments/sharp_energy/run.py

Models and stores are made by `dmin evaluate`, and kept under --cache: what is there is found again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

from dmin.attribution import FeatureSet, SharpEnergy
from dmin.data.digits import PlantedDigits
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Stratified
from dmin.evaluation import SameColumn
from dmin.evaluation.metrics import measure
from dmin.evaluation.retraining.ensemble import Ensemble, Recipe
from dmin.evaluation.truths.lds import lds, membership, random_subsets
from dmin.models.toy.mlp import MLP
from dmin.runtime.escape import write_csv
from dmin.store import Store
from experiments.record import recorded

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
WORLDS = {
    "digits": (
        *("tuning=null", "costly_for=[]", "transforms=false", "untrained=false"),
        *(f"tasks.generated.truths.{name}=null" for name in ("union", "class_out")),
    ),
    "shapes": ("tuning=null", "untrained=false"),
    "lora": ("tuning=null",),
    "captioned": ("tuning=null", "untrained=false"),  # on which nothing is chosen
}
ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
DIMENSIONS = (0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)
POWERS, CHOSEN = (1.0, 2.0), {"effective": 8.0, "p": 2.0}
KAPPAS, SHARES, NORMS = (0.25, 0.5, 1.0), (0.1, 0.2, 0.5, 1.0), (0.5, 1.0)


class Setup:
    """A benchmark's training examples and the queries that settings are chosen by."""

    def __init__(self, name: str, cache: Path) -> None:
        folder = cache / name
        if not list(folder.glob("outputs/runs/evaluate/*/results.csv")):
            folder.mkdir(parents=True, exist_ok=True)
            settings = [f"benchmark.{each}" for each in WORLDS[name]]
            command = ["-m", "dmin", "evaluate", f"benchmark={name}", *settings]
            command += ["benchmark.methods=[random,dmin]", "extras.threads=1"]
            path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
            subprocess.run(
                [sys.executable, *command], cwd=folder, env={**os.environ, "PYTHONPATH": path}
            ).check_returncode()

        def side(role: str, readouts: int = 0) -> FeatureSet:
            found = [Store(p) for p in folder.glob(f"outputs/stores/*s-{role}-*")]
            found = [s for s in found if "untrained" not in s.path.name]
            return FeatureSet(max(found, key=lambda s: (len(s.layout.readouts), len(s))))

        self.name, self.train = name, side("train")
        self.tune, self.copies = side("tune"), side("noisy-copies")
        self.right = SameColumn("source").relevant(self.tune.store, self.train.store)
        self.original = [
            self.train.store.index(facts["source_id"]) for facts in self.copies.store.metadata
        ]
        self.losses = self._retrained(folder) if name == "digits" else None

    def _retrained(self, folder: Path) -> np.ndarray:
        """Return what models of random halves lose on the tune queries, ``[subsets, queries]``."""
        model, data = partial(MLP.small, width=96, depth=3, embedding=32), PlantedDigits()
        ensemble = Ensemble(model, data, Recipe(1500), folder / "outputs/retrained")
        subsets, asked = random_subsets(len(data), 64), PlantedDigits("sources_tune")
        self.members, template = membership(subsets, len(data)), model()
        steps, noise = list(Stratified(20)(template.timesteps)), SharedNoise(seed=1, draws=4)
        found = [ensemble.outcomes(subsets, seed, asked, steps, noise) for seed in (1, 2)]
        return np.mean(found, axis=0)

    def energies(self, method: SharpEnergy, queries: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
        """Return squares at each timestep ``[Q, n, T]``, and ``tanh z(q) · z(i)``."""
        asked = method.transform_query(queries.block(range(len(queries)), method.requires))
        block = self.train.block(range(len(self.train)), method.requires)
        method.lengths, method.sharpness = 0.0, 1.0
        squares = method.contributions(asked, block).sum(3)
        method.lengths = 1.0
        match = method.contributions(asked, block).sum(3) / squares.clamp(min=1e-38)
        return squares.double().numpy(), match.double().clamp(min=1e-38).log().numpy()

    def measured(self, scores: np.ndarray, copies: np.ndarray) -> dict[str, float]:
        """Return what scores of the tune queries and of the copies are worth."""
        detection = "precision@40" if self.name == "digits" else "mAP"
        found = {"source": measure(detection, scores, self.right).mean()}
        found["copies"] = (copies.argmax(1) == self.original).mean()
        if self.losses is not None:
            found["LDS"] = lds(scores, self.members, self.losses).mean()
        return {name: round(float(value), 4) for name, value in found.items()}


def spread(scores: np.ndarray) -> np.ndarray:
    """Return scores in units of their spread."""
    return scores / scores.std(1, keepdims=True)


def walked(setup: Setup) -> list[dict]:
    """Return a line for every setting."""
    method, rows = SharpEnergy(), []
    method.fit(setup.train)

    def add(what: str, score, **settings) -> None:
        found = setup.measured(*(score(*each) for each in both))
        rows.append({"world": setup.name, "what": what, **settings, **found})

    ways = [("alpha", ALPHAS), ("effective", DIMENSIONS)]
    for name, p in itertools.product([n for n, _ in ways], POWERS):
        for value in dict(ways)[name]:
            method.alpha, method.effective, method.p = None, None, p
            setattr(method, name, value)
            both = [setup.energies(method, side) for side in (setup.tune, setup.copies)]
            add("damping", lambda squares, match: squares.sum(2) ** 2, **{name: value}, p=p)
            if {name: value, "p": p} != CHOSEN:
                continue
            norms = torch.from_numpy(setup.train.store.norms("loss")).square().sum(-1).sqrt()
            relative = (norms.mean(1) / norms.mean((0, 1))).double().numpy()
            for power in NORMS:
                weight = relative ** (2 * power)
                add("norms", lambda x, _, w=weight: (x * w).sum(2) ** 2, norms=power)
            for kappa in KAPPAS:
                add("lengths", lambda x, m, k=kappa: (x * np.exp(k * m)).sum(2) ** 2, lengths=kappa)
            for kappa, share in itertools.product(KAPPAS, SHARES):

                def blend(x, m, k=kappa, share=share):
                    second = (x * np.exp(k * m)).sum(2)
                    return spread(x.sum(2) ** 2) + share * spread(second)

                add("blend", blend, lengths=kappa, share=share)
            add("lengths alone", lambda x, m: m.mean(2))
    return rows


def plot(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    colours = dict(zip(WORLDS, ("#0a6", "#06c", "#c60", "#888"), strict=True))
    for axis, name, label in (
        (axes[0], "alpha", "α, damping in mean eigenvalues"),
        (axes[1], "effective", "d, effective dimension"),
    ):
        for world, p in itertools.product(WORLDS, POWERS):
            line = [r for r in rows if r["world"] == world and r.get(name) and r.get("p") == p]
            axis.plot(
                [r[name] for r in line],
                [r["source"] for r in line],
                color=colours[world],
                ls="-" if p == 2 else ":",
                label=world if p == 2 else None,
            )
        axis.set(xscale="log", ylim=(0, 1), xlabel=label, ylabel="source found, tune queries")
    axes[1].axvline(CHOSEN["effective"], color="k", lw=0.6)
    axes[0].legend(title="solid p = 2, dotted p = 1", fontsize=8, title_fontsize=8)
    ways = {
        "directions alone": ("damping", CHOSEN),
        "γ = ½": ("norms", {"norms": 0.5}),
        "κ = ½": ("lengths", {"lengths": 0.5}),
        "blend": ("blend", {"lengths": 1.0, "share": 0.5}),
        "lengths alone": ("lengths alone", {}),
    }
    for number, (label, (what, settings)) in enumerate(ways.items()):
        found = [
            next(
                r["source"]
                for r in rows
                if r["world"] == world
                and r["what"] == what
                and all(r.get(k) == v for k, v in settings.items())
            )
            for world in WORLDS
        ]
        axes[2].bar(np.arange(4) + 0.16 * (number - 2), found, 0.15, label=label)
    axes[2].set_xticks(range(4), list(WORLDS))
    axes[2].set(ylim=(0, 1.25), title="what lengths add, at d = 8, p = 2")
    axes[2].legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("outputs/sharp_energy"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in WORLDS:
        rows += walked(Setup(name, options.cache.absolute()))
        print(name, flush=True)
    write_csv(HERE / "results.csv", rows)
    plot(rows, HERE / "results.png")


if __name__ == "__main__":
    with recorded(__file__, seeds={"model": 0, "retrained": [1, 2], "noise": 0}):
        main()
