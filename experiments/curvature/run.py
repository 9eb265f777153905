"""What a low rank of the curvature costs and misses, and how the model's own curvature compares.

    python experiments/curvature/run.py

The model and its stores are kept under --cache and found again.
"""

from __future__ import annotations

import argparse
import csv
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch

from dmin.attribution.curvature.curvature import Curvature, fit_curvature
from dmin.attribution.curvature.functional_loss import FunctionalLoss
from dmin.attribution.curvature.hessian import LossCurvature
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Examples
from dmin.data.digits import Digits
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Stratified
from dmin.evaluation import Ensemble, Recipe
from dmin.models.toy.mlp import MLP
from dmin.runtime.escape import write_csv
from dmin.sketches import BlockCyclic
from dmin.store import Store
from experiments.record import recorded

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
DIMS, RANKS, ALPHAS = (1024, 4096), (8, 32, 128, 512), (0.1, 1.0)
STEPS, EXAMPLES, QUERIES, EIGENVALUES = 5, 1000, 50, 20
WAYS = {"truncated": None, "random, 1 pass": 1, "random, 2 passes": 2, "random, 3 passes": 3}


def collector(model, dim: int) -> GradientCollector:
    return GradientCollector(model, BlockCyclic(dim), Stratified(STEPS), SharedNoise())


def stores(model, dim: int, cache: Path) -> list[Store]:
    """Return the stores of training examples and of held-out queries."""
    made = []
    sets = Digits("train").examples[:EXAMPLES], Digits("heldout").examples[:QUERIES]
    for examples in sets:
        source = collector(model, dim)
        name = source.manifest(Examples(examples)).fingerprint
        trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
        made.append(source.collect(Examples(examples), cache / f"store-{name}", trainer=trainer))
    return made


def unit(store: Store) -> torch.Tensor:
    """Return unit rows, ``[n, T, k]``."""
    rows = torch.from_numpy(store.features("loss"))[:, 0, :, 0]
    return torch.nn.functional.normalize(rows, dim=-1)


def fitted(rows: torch.Tensor, rank: int | None, passes: int | None) -> tuple[Curvature, float]:
    """Return a curvature and the CPU seconds it took; passes of None: from all inner products."""
    n, steps, dim = rows.shape
    memory = 1 << 34
    if passes is not None and rank is not None:  # exactly what the random basis needs
        memory = 8 * dim * (2 * steps + 4) * (rank + 10 + rank // 5)
    start = time.process_time()
    found = fit_curvature(lambda: iter(rows.split(128)), (n, steps, dim), rank, memory, passes or 1)
    return found, time.process_time() - start


def truncated(exact: Curvature, rank: int | None) -> Curvature:
    """Return the leading eigenvectors of a curvature, and one number for the rest."""
    if rank is None:
        return exact
    values, vectors = exact.values[:, :rank], exact.vectors[:, :rank]
    rest = (exact.trace - values.sum(1)) / (exact.support - rank)
    return Curvature(values, vectors, rest, exact.trace, exact.support)


def agreement(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the share of the ten best that two score matrices have in common."""
    best = [scores.topk(10, 1).indices for scores in (found, exact)]
    return float(
        np.mean(
            [
                len(set(a) & set(b)) / 10
                for a, b in zip(*map(torch.Tensor.tolist, best), strict=True)
            ]
        )
    )


def low_rank(model, cache: Path, log) -> list[dict]:
    """Return the error of (C + λ)⁻¹ v over rank, way and k."""
    rows = []
    for dim in DIMS:
        train, queries = map(unit, stores(model, dim, cache))
        exact, seconds = fitted(train, None, None)
        log(f"k={dim}, all directions", seconds)
        for rank in (None, *RANKS):
            for way, passes in WAYS.items():
                # With 512 directions a random basis takes more memory than all inner products.
                if passes is not None and (rank is None or rank > 128):
                    continue
                if passes is None:  # the eigendecomposition is the same, fewer are kept
                    found, spent = truncated(exact, rank), seconds
                else:
                    found, spent = fitted(train, rank, passes)
                row = {
                    "k": dim,
                    "rank": found.values.shape[1],
                    "way": "all" if rank is None else way,
                    "energy": round(float(found.kept.mean()), 4),
                    "seconds": round(spent, 2),
                    "relative seconds": round(spent / seconds, 2),
                    "MiB": round(found.vectors.numel() * 4 / 2**20, 1),
                }
                for alpha in ALPHAS:
                    damping = alpha * exact.mean_eigenvalue
                    dense = exact.power(queries, damping, 1.0) * damping[:, None]
                    low = found.power(queries, damping, 1.0) * damping[:, None]
                    error = (low - dense).norm(dim=2) / dense.norm(dim=2)
                    scores = [torch.einsum("qtk,ntk->qn", v.float(), train) for v in (low, dense)]
                    row[f"error, α={alpha:g}"] = round(float(error.median()), 4)
                    row[f"top 10, α={alpha:g}"] = round(agreement(*scores), 3)
                    row[f"dimension, α={alpha:g}"] = round(
                        float(found.effective_dimension(damping).mean()), 1
                    )
                rows.append(row)
                log(f"k={dim} rank={rank} {way}", spent)
    return rows


def model_curvature(model, cache: Path, log) -> list[dict]:
    """Return leading eigenvalues of GGN, Hessian and sketched Fisher matrix at each timestep."""
    source, rows = collector(model, 16384), []
    examples = Digits("train").examples[:EXAMPLES]
    store = stores(model, 16384, cache)[0]
    gradients = torch.from_numpy(store.features("loss") * store.norms("loss")[..., None])[
        :, 0, :, 0
    ]
    for number, t in enumerate(source.timesteps):
        fisher, _ = fitted(gradients[:, number : number + 1], None, None)
        values = {"fisher": fisher.values[0, :EIGENVALUES]}
        overlap = {}
        for kind in ("ggn", "hessian"):
            start = time.process_time()
            operator = LossCurvature(FunctionalLoss(source, [t]), examples, kind, batch_size=1000)
            found = operator.eigenpairs(EIGENVALUES, 1e-4)
            values[kind] = found.values
            sketched = source.sketch.of(operator.loss.shaped(found.vectors))[:, 0]
            inside = sketched.double() @ fisher.vectors[0, :50].double().T
            overlap[kind] = inside.square().sum(1) / sketched.double().square().sum(1)
            log(f"t={t:g} {kind}", time.process_time() - start)
        for index in range(EIGENVALUES):
            row = {"timestep": t, "index": index + 1}
            row |= {kind: f"{float(v[index]):.5g}" for kind, v in values.items()}
            row |= {f"{k} in fisher's 50": round(float(v[index]), 4) for k, v in overlap.items()}
            rows.append(row)
    return rows


def plot(ranks: list[dict], eigenvalues: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    colours = dict(zip(DIMS, ("tab:green", "tab:blue"), strict=True))
    styles = dict(zip(WAYS, ("-", ":", "--", "-."), strict=True))
    for dim in DIMS:
        for way, style in styles.items():
            part = [r for r in ranks if r["k"] == dim and r["way"] == way]
            for axis, name in ((axes[0], "error, α=0.1"), (axes[1], "top 10, α=0.1")):
                axis.plot(
                    [r["rank"] for r in part],
                    [r[name] for r in part],
                    style,
                    color=colours[dim],
                    marker=".",
                    label=f"k = {dim:,}, {way}",
                )
    for axis, title in ((axes[0], "error of $(C+\\lambda)^{-1}q$"), (axes[1], "same ten best")):
        axis.set(xscale="log", xlabel="rank", title=f"{title}, α = 0.1")
    axes[0].legend(fontsize=6)
    steps = sorted({r["timestep"] for r in eigenvalues}, reverse=True)
    shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(steps)))
    for kind, style in (("ggn", "-"), ("hessian", "--"), ("fisher", ":")):
        for t, shade in zip(steps, shades, strict=True):
            part = [abs(float(r[kind])) for r in eigenvalues if r["timestep"] == t]
            label = f"{kind}, t = {t:g}"
            axes[2].plot(range(1, len(part) + 1), part, style, color=shade, label=label)
    axes[2].set(yscale="log", xlabel="index", title="|eigenvalues| at each timestep")
    axes[2].legend(fontsize=6, ncol=3)
    figure.savefig(path, dpi=110)


def read(name: str) -> list[dict]:
    """Return a table as it was written, numbers as numbers."""
    with (HERE / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k == "way" else float(v) for k, v in row.items()} for row in rows]


def tables(ranks: list[dict], eigenvalues: list[dict]) -> str:
    """Return both tables as Markdown; of the eigenvalues the 1st, 5th and 20th."""
    lines = [
        "| k | rank | way | energy | error α = .1 | same ten best α = .1 | error α = 1 | "
        "same ten best α = 1 | CPU seconds | MiB |",
        "|" + "---|" * 10,
    ]
    for r in ranks:
        cells = [f"{r['k']:,.0f}", f"{r['rank']:.0f}", r["way"], f"{r['energy']:.1%}"]
        for alpha in ALPHAS:
            cells += [f"{r[f'error, α={alpha:g}']:.3f}", f"{r[f'top 10, α={alpha:g}']:.0%}"]
        lines.append("| " + " | ".join([*cells, f"{r['seconds']:.1f}", f"{r['MiB']:.1f}"]) + " |")
    lines += [
        "",
        "| t | j | GGN | Hessian | sketched Fisher | GGN's v_j within the Fisher's first 50 |",
        "|" + "---|" * 6,
    ]
    for r in eigenvalues:
        if r["index"] in (1, 5, 20):
            cells = [f"{r['timestep']:.0f}", f"{r['index']:.0f}"]
            cells += [f"{r[kind]:.3g}" for kind in ("ggn", "hessian", "fisher")]
            share = r["ggn in fisher's 50"]
            lines.append("| " + " | ".join([*cells, f"{share:.0%}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("outputs/curvature"))
    parser.add_argument("--part", choices=("eigenvalues", "ranks", "plot"), help="only that")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def log(what: str, seconds: float) -> None:
        print(f"{seconds:7.1f} s  {what}", flush=True)

    build = partial(MLP.small, width=96, depth=3, embedding=32)
    train = Examples(Digits("train").examples[:EXAMPLES])
    ensemble = Ensemble(build, train, Recipe(), options.cache / "models")
    model = ensemble.load(ensemble.train([np.arange(EXAMPLES)], 1000), 0)
    for name, measure in (("eigenvalues", model_curvature), ("ranks", low_rank)):
        if options.part in (None, name):
            found = measure(model, options.cache, log)
            write_csv(HERE / f"{name}.csv", found)
    if all((HERE / f"{name}.csv").is_file() for name in ("eigenvalues", "ranks")):
        ranks, eigenvalues = read("ranks"), read("eigenvalues")
        plot(ranks, eigenvalues, HERE / "curvature.png")
        (HERE / "table.md").write_text(tables(ranks, eigenvalues))


if __name__ == "__main__":
    with recorded(__file__, seeds={"model": 1000, "noise": 0, "sketch": 0}):
        main()
