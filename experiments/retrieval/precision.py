"""What does the type that rows are stored in do to scores and to the ten best? See README.md."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from data import Resampled

from dmin.attribution import retrieve, score_matrix
from dmin.attribution.methods.dmin import DMin
from dmin.store import Layout, Manifest, Rows, Store, StoreWriter
from dmin.store.maintenance import convert, info
from experiments.record import recorded

N, QUERIES, TIMES, DIM, K = 2000, 60, 10, 4096, 10


def written(path, rows, name):
    layout = Layout(("loss",), 1, tuple(range(TIMES)), ("model",), DIM, "float32")
    with StoreWriter(path, Manifest(layout, {}, {"name": name}, len(rows), len(rows))) as writer:
        ones = np.ones((len(rows), 1, TIMES, 1), np.float32)
        ids = [f"{row}" for row in range(len(rows))]
        features = {"loss": rows[:, None, :, None]}
        writer.append(0, Rows(ids, [{}] * len(rows), features, {"loss": ones}, ones[..., 0]))
    return Store(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--real", type=Path, required=True, help="two stores, train and held")
    parser.add_argument("--scratch", type=Path, default=Path("outputs/precision"))
    options = parser.parse_args()
    shutil.rmtree(options.scratch, ignore_errors=True)
    world = Resampled(TIMES, DIM, options.real)
    rows, asked = world.rows(N, 1), world.rows(QUERIES, 2, queries=True)
    exact = np.einsum(
        "qtk,ntk->qn", asked.astype(np.float64), rows.astype(np.float64), optimize=True
    )
    order = np.argsort(-exact, axis=1, kind="stable")[:, :K]
    best = np.take_along_axis(exact, order, 1)
    raw = Store(options.real / "train").manifest.features["parameters"]["count"] * TIMES * 4
    train = written(options.scratch / "train", rows, "train")
    queries = written(options.scratch / "queries", asked, "queries")
    lines = [
        "| stored as | KiB per example | times smaller than its gradients | score, rms error "
        "| largest error | overlap of the ten best | same first result |",
        "|---|---|---|---|---|---|---|",
    ]
    results = []
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        pair = [
            store if dtype == "float32" else convert(store, f"{store.path}-{dtype}", dtype)
            for store in (queries, train)
        ]
        error = score_matrix(*pair, DMin()) - exact
        found = retrieve(*pair, k=K).train_rows
        same = np.mean([len({*a} & {*b}) / K for a, b in zip(found, order, strict=True)])
        size = info(pair[1])["bytes an example"]
        each = {
            "dtype": dtype,
            "bytes an example": size,
            "times less": raw / size,
            "rms": float(np.sqrt(np.square(error).mean())),
            "max": float(np.abs(error).max()),
            "same": float(same),
            "first": float((found[:, 0] == order[:, 0]).mean()),
        }
        results.append(each)
        lines.append(
            f"| {dtype} | {size / 1024:,.1f} | {each['times less']:,.0f} | {each['rms']:.1e}"
            f" | {each['max']:.1e} | {same:.4f} | {each['first']:.3f} |"
        )
    gap = float((best[:, K - 1] - np.sort(exact, axis=1)[:, -K - 1]).mean())
    about = {"N": N, "queries": QUERIES, "gap of the 10th to the 11th, mean": gap}
    print("\n".join(lines), about)
    here = Path(__file__).parent
    (here / "precision.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    (here / "precision.md").write_text("\n".join(lines) + "\n")
    shutil.rmtree(options.scratch)


if __name__ == "__main__":
    with recorded(__file__):
        main()
