"""What does each sketch lose, on trained models of three kinds? See README.md.

python experiments/sketches/run.py                     # all of it; goes on where it was stopped
python experiments/sketches/run.py rows [kind ...]     # errors
python experiments/sketches/run.py time [kind ...]     # seconds
python experiments/sketches/run.py report              # results.csv, results.png
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import KINDS, trained
from report import draw
from scipy.stats import rankdata
from torch import Tensor

from dmin.collect import GradientCollector
from dmin.data.base import collate
from dmin.diffusion.timesteps import Stratified
from dmin.models.base import per_example_loss
from dmin.runtime.escape import write_csv
from dmin.sketches import (
    OPORP,
    SJLT,
    BlockCyclic,
    Factored,
    FullGradient,
    Gaussian,
    MaskSJLT,
    Sketch,
    TensorSketch,
)
from dmin.sketches.bounds import matrix_shape
from dmin.sketches.hashing import hash_words, key, signs
from experiments.record import recorded

CACHE, HERE = Path("outputs/sketches"), Path(__file__).parent
TRAIN, QUERIES, TIMESTEPS, TOP, BLOCK = 240, 16, 4, 100, 16
DIMS = [2**n for n in range(8, 17)]
SEEDS = 3
GAUSSIAN = 1024, 1024  # the largest k, and how much of it is drawn at once: 3 to 4 GB


class IndependentTensorSketch(TensorSketch):
    """As published (Pham & Pagh 2013): the hashes of a side may meet."""

    def _hashes(self, parameter: Any, device: Any) -> Any:
        return tuple(
            (
                hash_words(key(self.seed, parameter.name, side), size, device) % self.dim,
                signs(key(self.seed, parameter.name, side, "sign"), size, device),
            )
            for side, size in zip(("row", "column"), matrix_shape(parameter.shape), strict=True)
        )


FAMILIES: dict[str, Callable[[int, int], Sketch]] = {
    "block_cyclic": lambda k, seed: BlockCyclic(k, seed),
    "oporp": lambda k, seed: OPORP(k, seed),
    "tensor_sketch": lambda k, seed: TensorSketch(k, seed),
    "tensor_sketch_independent": lambda k, seed: IndependentTensorSketch(k, seed),
    "sjlt": lambda k, seed: SJLT(k, seed),
    "mask_sjlt": lambda k, seed: MaskSJLT(k, seed),
    "factored": lambda k, seed: Factored(k, seed),
    "gaussian": lambda k, seed: Gaussian(k, seed),
}


class Setup:
    """A trained model, its training examples and queries, encoded."""

    def __init__(self, kind: str) -> None:
        self.kind, self.model = kind, trained(kind, CACHE)
        data = KINDS[kind][1]
        train, held = data("train"), data("heldout")
        examples = [train[i] for i in range(TRAIN)] + [held[i] for i in range(QUERIES)]
        batch = collate(examples)
        self.ids = batch["id"]
        self.x0, self.condition = self.model.encode(batch)

    def collector(self, sketch: Sketch) -> GradientCollector:
        return GradientCollector(
            self.model, sketch, Stratified(TIMESTEPS), microbatch=BLOCK * TIMESTEPS
        )

    def blocks(self, sketch: Sketch) -> Iterator[Tensor]:
        """Yield the rows ``[T, n, k]`` of blocks of examples, queries last."""
        collector = self.collector(sketch)
        for start in range(0, len(self.x0), BLOCK):
            part = slice(start, start + BLOCK)
            condition = {name: value[part] for name, value in self.condition.items()}
            found = collector.features(self.x0[part], condition, self.ids[part])
            yield found.values["loss"][:, 0, :, 0].transpose(0, 1)

    def rows(self, family: str, dim: int, seed: int) -> Tensor:
        """Return the rows ``[T, n, k]`` of all examples, queries last."""
        if family != "gaussian":
            return torch.cat(list(self.blocks(FAMILIES[family](dim, seed))), 1)
        # Rows of a Gaussian matrix are independent: many are drawn and multiplied piece by piece.
        step = min(dim, GAUSSIAN[1])
        pieces = [Gaussian(step, 1000 * seed + n, 1 << 33) for n in range(dim // step)]
        return torch.cat([torch.cat(list(self.blocks(piece)), 1) for piece in pieces], 2)


def exact_cosines(setup: Setup) -> np.ndarray:
    """Return the cosines of the uncompressed gradients, ``[T, queries, train]``."""
    file = CACHE / f"{setup.kind}-exact.npy"
    if not file.is_file():
        # Two passes: the queries' gradients are kept, the others only looked at.
        collector, found = setup.collector(FullGradient()), []
        last = slice(TRAIN, None)
        condition = {name: value[last] for name, value in setup.condition.items()}
        rows = collector.features(setup.x0[last], condition, setup.ids[last]).values["loss"]
        queries = torch.nn.functional.normalize(rows[:, 0, :, 0].transpose(0, 1), dim=-1)
        for block in setup.blocks(FullGradient()):
            block = torch.nn.functional.normalize(block, dim=-1)
            found.append(torch.einsum("tqp,tnp->tqn", queries, block))
        np.save(file, torch.cat(found, 2)[:, :, :TRAIN].numpy())
    return np.load(file)


def cosines(rows: Tensor) -> np.ndarray:
    rows = torch.nn.functional.normalize(rows, dim=-1)
    return torch.einsum("tqk,tnk->tqn", rows[:, TRAIN:], rows[:, :TRAIN]).numpy()


def errors(exact: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Compare cosines ``[T, queries, train]`` and the rankings of their sums over timesteps."""
    truth, scores = exact.sum(0), found.sum(0)
    best = np.argsort(-truth, axis=1, kind="stable")
    rho, hits = [], []
    for q in range(QUERIES):
        top = best[q, :TOP]
        rho.append(np.corrcoef(rankdata(truth[q, top]), rankdata(scores[q, top]))[0, 1])
        mine = np.argsort(-scores[q], kind="stable")[:10]
        hits.append(len(set(mine) & set(best[q, :10])) / 10)
    return {
        "rmse": float(np.sqrt(np.square(found - exact).mean())),
        "spearman_top100": float(np.mean(rho)),
        "overlap_top10": float(np.mean(hits)),
    }


def measure_rows(kind: str) -> None:
    """Write the errors of every family, k and seed that the cache does not have yet."""
    setup = Setup(kind)
    exact = exact_cosines(setup)
    file = CACHE / f"{kind}-errors.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for family, seed, dims in wanted():
        if all(f"{family} {dim} {seed}" in found for dim in dims):
            continue
        rows = setup.rows(family, dims[-1], seed)
        for dim in dims:
            smaller = rows[..., :dim] if family == "gaussian" else folded(rows, dim)
            name = f"{family} {dim} {seed}"
            found[name] = errors(exact, cosines(smaller))
            print(kind, name, found[name], flush=True)
        save(found, file)


def wanted() -> list[tuple[str, int, list[int]]]:
    """Return families, draws and k to measure: the ones that cost least come first."""
    folds = {family: build(DIMS[-1], 0).folds is not None for family, build in FAMILIES.items()}
    order = sorted(FAMILIES, key=lambda family: (family == "gaussian", not folds[family]))
    draws = [(family, seed) for family in order for seed in range(SEEDS)]
    draws.sort(key=lambda draw: (draw[0] == "gaussian", not folds[draw[0]], draw[1]))
    return [(*draw, dims) for draw in draws for dims in passes(draw[0], folds[draw[0]])]


def passes(family: str, folds: bool) -> list[list[int]]:
    """Return the k that are had from each pass over the examples."""
    if family == "gaussian":  # its first k rows are one of k
        return [[dim for dim in DIMS if dim <= GAUSSIAN[0]]]
    return [DIMS] if folds else [[dim] for dim in DIMS]


def folded(rows: Tensor, dim: int) -> Tensor:
    return rows.unflatten(-1, (-1, dim)).sum(-2)


def save(found: dict[str, Any], file: Path) -> None:
    part = file.with_suffix(".part")  # a run that is stopped leaves whole files
    part.write_text(json.dumps(found, indent=0))
    part.replace(file)


def measure_time(kind: str, rounds: int = 5) -> None:
    """Write seconds a gradient, each family beside plain training in the same round."""
    torch.set_num_threads(1)
    setup = Setup(kind)
    pairs, file = BLOCK * TIMESTEPS, CACHE / f"{kind}-seconds.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    x0, ids = setup.x0[:BLOCK], setup.ids[:BLOCK]
    condition = {name: value[:BLOCK] for name, value in setup.condition.items()}
    count = setup.collector(FullGradient()).attributed.count
    wanted = [(family, dim) for dim in (4096, 256, 65536) for family in FAMILIES]
    timesteps = list(setup.collector(FullGradient()).timesteps)
    repeated = {name: value.repeat_interleave(TIMESTEPS, 0) for name, value in condition.items()}
    many = x0.repeat_interleave(TIMESTEPS, 0)
    t = torch.tensor(timesteps).repeat(BLOCK)
    noise = torch.randn(many.shape)

    def plain() -> None:
        loss = per_example_loss(setup.model.predict(many, noise, t, repeated)).sum()
        loss.backward()
        setup.model.zero_grad(set_to_none=True)

    def seconds(work: Callable[[], Any]) -> float:
        start = time.process_time()  # of one thread: others at work on the machine do not count
        work()
        return (time.process_time() - start) / pairs

    for family, dim in wanted:
        name = f"{family} {dim}"
        if name in found or not fits(family, dim, count):
            continue
        collector = setup.collector(FAMILIES[family](dim, 0))
        run = lambda: collector.features(x0, condition, ids)  # noqa: B023, E731
        run(), plain()
        taken = [(seconds(run), seconds(plain)) for _ in range(rounds)]
        ours, theirs = np.array(taken).T
        found[name] = {
            "seconds": float(ours.min()),
            "plain": float(theirs.min()),
            "ratio": float(np.median(ours / theirs)),
        }
        print(kind, name, found[name], flush=True)
        save(found, file)


def fits(family: str, dim: int, count: int) -> bool:
    """Whether a matrix, if the family keeps one, stays below a gigabyte."""
    return family != "gaussian" or 4 * dim * count <= 1 << 30


def state_bytes(family: str, dim: int, count: int) -> int:
    """What a family keeps beside the model."""
    return {"oporp": 5 * count, "gaussian": 4 * count * dim}.get(family, 0)


def cached(name: str) -> dict[str, Any]:
    return json.loads((CACHE / name).read_text()) if (CACHE / name).is_file() else {}


def table() -> list[dict[str, Any]]:
    lines = []
    for kind in KINDS:
        if not (CACHE / f"{kind}-errors.json").is_file():
            continue
        count = sum(p.numel() for p in KINDS[kind][0]().network.parameters())
        found, seconds = (cached(f"{kind}-{what}.json") for what in ("errors", "seconds"))
        for family in FAMILIES:
            for dim in DIMS:
                seeds = [found[n] for s in range(SEEDS) if (n := f"{family} {dim} {s}") in found]
                if not seeds:
                    continue
                timed = seconds.get(f"{family} {dim}", {})
                lines.append(
                    {
                        "model": kind,
                        "parameters": count,
                        "sketch": family,
                        "k": dim,
                        "seeds": len(seeds),
                        **{m: f"{np.mean([s[m] for s in seeds]):.4f}" for m in seeds[0]},
                        "rmse_spread": spread([s["rmse"] for s in seeds]),
                        "ms_a_gradient": f"{1e3 * timed['seconds']:.3f}" if timed else "",
                        "ratio_to_plain": f"{timed['ratio']:.2f}" if timed else "",
                        "stored_bytes": 2 * dim,
                        "state_bytes": state_bytes(family, dim, count),
                    }
                )
    return lines


def spread(found: list[float]) -> str:
    return f"{np.ptp(found):.4f}" if len(found) > 1 else ""


def markdown(lines: list[dict[str, Any]], dim: int = 4096) -> str:
    """Lay out what the families lose and cost at one k."""
    head = ["model", "sketch", "rmse", "rank correlation, top 100", "of plain training's time"]
    rows = [
        [
            line["model"],
            line["sketch"],
            line["rmse"],
            line["spearman_top100"],
            line["ratio_to_plain"],
        ]
        for line in lines
        if line["k"] == dim
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * 5, *rows]) + "\n"


def write_report() -> None:
    lines = table()
    write_csv(HERE / "results.csv", lines)
    (HERE / "table.md").write_text(markdown(lines))
    draw(lines, HERE / "results.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "stage", nargs="?", default="all", choices=["all", "rows", "time", "report"]
    )
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        if arguments.stage in ("all", "rows"):
            measure_rows(kind)
        if arguments.stage in ("all", "time"):
            measure_time(kind)
    if arguments.stage in ("all", "report"):
        write_report()


if __name__ == "__main__":
    with recorded(__file__, seeds=list(range(SEEDS))):
        main()
