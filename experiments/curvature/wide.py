"""Streaming curvature of wide rows in bounded memory, and frequent directions beside it.

    python experiments/curvature/wide.py

Each way to fit runs in a process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dmin.attribution.curvature.curvature import Curvature, fit_curvature
from dmin.runtime.escape import write_csv

HERE = Path(__file__).parent
WIDTHS, MEMORIES, PASSES = (16_384, 65_536), (256 << 20,), (1, 2)
ROWS, KINDS, BLOCK, LATENT = 2048, 2, 64, 256  # rows of two timesteps, in blocks
DECAYS, RANKS, SMALL = (0.5, 1.0, 2.0), (20, 60, 120), (1500, 400)


def rows(width: int, count: int = ROWS) -> Iterator[Tensor]:
    """Yield blocks of rows that vary along 256 directions of falling strength, and in all others.

    Each direction is one of every 256 columns, so that they need no memory.
    """
    generator = torch.Generator().manual_seed(0)
    strength = torch.arange(1, LATENT + 1).float() ** -0.5
    for _ in range(0, count, BLOCK):
        x = 0.05 * torch.randn(BLOCK, KINDS, width, generator=generator) / width**0.5
        latent = torch.randn(BLOCK, KINDS, LATENT, generator=generator) * strength
        yield x + latent.repeat(1, 1, width // LATENT) / width**0.5


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def fit_wide(width: int, memory: int, passes: int) -> dict[str, float]:
    """Fit once, and return what it took."""
    torch.set_num_threads(1)
    fit_curvature(lambda: rows(1024, 128), (128, KINDS, 1024), memory=1 << 20)  # libraries
    before, start = peak(), time.process_time()
    for _ in rows(width):
        pass
    reading, start = time.process_time() - start, time.process_time()
    found = fit_curvature(lambda: rows(width), (ROWS, KINDS, width), None, memory, passes)
    fitting, grown = time.process_time() - start - passes * reading, peak() - before
    start = time.process_time()
    found.power(next(rows(width))[:8], 0.1 * found.mean_eigenvalue, 1.0)
    return {
        "k": width,
        "memory given, MiB": memory >> 20,
        "passes": passes,
        "directions": found.vectors.shape[1],
        "energy": round(float(found.kept.mean()), 4),
        "fit, CPU s": round(fitting, 1),
        "fit, µs a row and timestep": round(1e6 * fitting / (ROWS * KINDS * passes)),
        "(C+λ)⁻¹ of 8 queries, CPU s": round(time.process_time() - start, 2),
        "peak above start, MiB": round(grown / 2**20),
        "C alone, MiB": KINDS * width**2 * 8 >> 20,
    }


def frequent_directions(x: Tensor, size: int, compensated: bool) -> Curvature:
    """Return the sketch of Liberty 2013 (``‖C − BᵀB‖ ≤ ‖Φ − Φ_j‖² / (size − j)``) as a curvature.

    Args:
        x: rows, ``[n, 1, m]``.
        size: rows kept; 2 · size stand there before each shrinking.
        compensated: give the kept directions back what shrinking took, which it bounds.
    """
    n, _, m = x.shape
    sketch, lost = torch.zeros(0, m, dtype=torch.float64), 0.0
    for block in x[:, 0].double().split(size):
        sketch = torch.cat([sketch, block])
        values, u = torch.linalg.eigh(sketch @ sketch.T)
        values, u = values.flip(0).clamp(min=0), u.flip(1)
        if len(values) > size:
            least = values[size]
            kept = (values[:size] - least).clamp(min=0)
            turn = (kept / values[:size].clamp(min=1e-300)).sqrt()[:, None] * u[:, :size].T
            sketch, lost = turn @ sketch, lost + float(least)
    values, u = torch.linalg.eigh(sketch @ sketch.T)
    values, u = values.flip(0).clamp(min=1e-300), u.flip(1)
    vectors = (u.T @ sketch) / values.sqrt()[:, None]
    values = (values + lost * compensated)[None] / n
    trace = x.double().square().sum((0, 2)) / n
    rest = (trace - values.sum(1)).clamp(min=0) / (min(n, m) - values.shape[1])
    return Curvature(values, vectors.float()[None], rest, trace, min(n, m))


def compare() -> list[dict[str, object]]:
    """Return the error of (C + λ)⁻¹ v by each way, over the decay of the spectrum and the rank."""
    found = []
    for decay in DECAYS:
        n, m = SMALL
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, m, generator=generator) * torch.arange(1, m + 1) ** (-decay / 2)
        x = (x @ torch.linalg.qr(torch.randn(m, m, generator=generator))[0])[:, None]
        exact = fit_curvature(lambda x=x: iter(x.split(BLOCK)), (n, 1, m))
        damping = 0.1 * exact.mean_eigenvalue
        solved = exact.power(x[:50], damping, 1.0)

        def error(way: Curvature, x=x, damping=damping, solved=solved) -> float:
            off = way.power(x[:50], damping, 1.0) - solved
            return round(float(off.norm() / solved.norm()), 3)

        for rank in RANKS:
            row: dict[str, object] = {"eigenvalues ∝ j^−": decay, "rank": rank}
            row["frequent directions"] = error(frequent_directions(x, rank, False))
            row["compensated"] = error(frequent_directions(x, rank, True))
            for passes in (1, 2):
                memory = 8 * m * 6 * (rank + 10 + rank // 5)
                shape, stream = (n, 1, m), lambda x=x: iter(x.split(BLOCK))
                random = fit_curvature(stream, shape, rank, memory, passes)
                row[f"random basis, {passes} pass(es)"] = error(random)
            values, vectors = exact.values[:, :rank], exact.vectors[:, :rank]
            rest = (exact.trace - values.sum(1)) / (exact.support - rank)
            best = Curvature(values, vectors, rest, exact.trace, exact.support)
            row["best of that rank"] = error(best)
            found.append(row)
    return found


def save(name: str, table: list[dict]) -> None:
    write_csv(HERE / name, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, type=int, help="k, memory, passes: print what it took")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(fit_wide(*options.one)))
        return
    torch.set_num_threads(1)
    save("ways.csv", compare())
    table = []
    for setting in itertools.product(WIDTHS, MEMORIES, PASSES):
        one = [sys.executable, __file__, "--one", *map(str, setting)]
        done = subprocess.run(one, capture_output=True, text=True, check=True)
        table.append(json.loads(done.stdout))
        print(table[-1], flush=True)
        save("wide.csv", table)


if __name__ == "__main__":
    main()
