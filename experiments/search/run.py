"""How quick are exact and certified search, beside what the machine can do? See README.md."""

import argparse
import gc
import json
import os
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from dmin.attribution.base import Linear
from dmin.attribution.search import certified_search
from dmin.attribution.search_index import ProjectionIndex
from dmin.attribution.search_scan import in_threads, scan
from dmin.attribution.search_topk import TopK
from dmin.store import Layout, Manifest, Rows, Store, StoreWriter

K, LATENT = 10, 256
SHAPES = [(10_000, 4, 1024), (100_000, 4, 1024), (10_000, 10, 4096)]  # N, T, k


class World:
    """Unit rows as gradients have them: 20 classes, a spectrum j^-1/2, and a fifth of noise."""

    def __init__(self, times, dim):
        self.generator = np.random.default_rng(0)
        self.shape = (1, times, 1, dim)
        scale = np.arange(1, LATENT + 1)[:, None] ** -0.5
        basis = self.generator.standard_normal((LATENT, times * dim), dtype=np.float32)
        self.basis = (basis * scale / np.sqrt(dim)).astype(np.float32)
        self.classes = 1.5 * self.generator.standard_normal((20, LATENT), dtype=np.float32)

    def rows(self, n):
        own = self.generator.standard_normal((n, LATENT), dtype=np.float32)
        latent = own + self.classes[self.generator.integers(0, 20, n)]
        rows = (latent @ self.basis).reshape(n, *self.shape)
        length = np.sqrt(np.square(rows).sum((3, 4), keepdims=True))
        noise = self.generator.standard_normal(rows.shape, dtype=np.float32)
        rows = rows / length + noise * float(np.sqrt(0.25 / self.shape[-1]))
        return rows / np.sqrt(np.square(rows).sum((3, 4), keepdims=True))


def written(path, world, n, dtype="float16"):
    """Write n rows through the store; return it and the seconds that the store took."""
    _, times, _, dim = world.shape
    layout = Layout(("loss",), 1, tuple(range(times)), ("model",), dim, dtype)
    manifest = Manifest(layout, {}, {"name": "synthetic"}, n, 500)
    seconds = 0.0
    with StoreWriter(path, manifest) as writer:
        for block in writer.pending():
            rows = manifest.block_rows(block)
            features = world.rows(len(rows))
            ones = np.ones((len(rows), 1, times, 1), np.float32)
            ids = [f"{row:07d}" for row in rows]
            start = time.perf_counter()
            writer.append(
                block, Rows(ids, [{}] * len(rows), {"loss": features}, {"loss": ones}, ones[..., 0])
            )
            seconds += time.perf_counter() - start
    return Store(path, verify=False), seconds


def timed(work, repeats):
    """Return seconds of the clock, best and median, and the least of the processors' seconds.

    Rates are taken from the processors' seconds: they do not depend on who else is at work.
    """
    clock, used = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        work()
        clock.append(time.perf_counter() - start[0])
        used.append(time.process_time() - start[1])
    return {"best": min(clock), "median": statistics.median(clock), "cpu": min(used)}


def exact(linear, store):
    best = TopK(len(linear.queries), K)
    for first, scores in scan(linear, store):
        best.update(scores, first)
    return best.rows


def plain_numpy(queries, store):
    """What one writes first: read a block, to float32, to unit rows, multiply, partial sort."""
    scores = []
    for start in range(0, len(store), 1024):
        rows = store.features("loss", start, start + 1024)
        rows /= np.sqrt(np.square(rows).sum((3, 4), keepdims=True))
        scores.append(queries @ rows.reshape(len(rows), -1).T)
    scores = np.concatenate(scores, axis=1)
    rows = np.argpartition(-scores, K, axis=1)[:, :K]
    return np.take_along_axis(rows, np.argsort(-np.take_along_axis(scores, rows, 1), 1), 1)


def machine(store):
    """Measure what bounds a search, a core: reading the same bytes, and the matrix product."""
    spans = [(at, min(at + 2000, len(store))) for at in range(0, len(store), 2000)]

    def read(span):
        return sum(
            int(torch.from_numpy(v.view(np.int64)).sum()) for v in store.stored("loss", *span)
        )

    files = sorted(store.path.glob("segment-*.h5"))
    size = len(store) * store.layout.row_bytes
    buffer = memoryview(bytearray(8 << 20))

    def copy(path):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    a, b = torch.randn(2, 2048, 2048)
    return {
        "memory GB/s": size / timed(lambda: list(in_threads(read, spans)), 7)["cpu"] / 1e9,
        "page cache read() GB/s": size / timed(lambda: [copy(p) for p in files], 3)["cpu"] / 1e9,
        "GEMM GFLOP/s": 2 * 2048**3 / timed(lambda: a @ b, 9)["cpu"] / 1e9,
    }


def cold(path, queries):
    """Seconds of a first search after the pages were dropped, and of reading the files plainly."""

    def drop():
        gc.collect()
        for file in path.glob("segment-*.h5"):
            with open(file, "rb") as raw:
                os.fsync(raw.fileno())
                os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read():
        for file in path.glob("segment-*.h5"):
            file.read_bytes()

    store = Store(path, verify=False)
    store.lengths("loss")
    drop()
    search = timed(lambda: exact(Linear(queries[:1], "unit"), store), 1)["best"]
    store = None
    drop()
    return {"exact, 1 query": search, "reading the files": timed(read, 1)["best"]}


def measure(folder, n, times, dim):
    world = World(times, dim)
    store, seconds = written(folder / "train", world, n)
    queries = torch.from_numpy(world.rows(1000))
    width, size = times * dim, n * store.layout.row_bytes
    found = {"N": n, "T": times, "k": dim, "store bytes": size, "write s": seconds}
    found["cold s"] = cold(store.path, queries)
    found["machine"] = rates = machine(store)
    found["load"] = os.getloadavg()[0]
    truth = exact(Linear(queries[:64], "unit"), store)
    for count, repeats in ((1, 15), (64, 2), (1000, 1)):
        asked = Linear(queries[:count], "unit")
        each = timed(lambda asked=asked: exact(asked, store), repeats)
        each["GB/s"] = size / each["cpu"] / 1e9
        each["of memory"] = each["GB/s"] / rates["memory GB/s"]
        each["of read()"] = each["GB/s"] / rates["page cache read() GB/s"]
        each["GFLOP/s"] = 2 * count * n * width / each["cpu"] / 1e9
        each["of GEMM"] = each["GFLOP/s"] / rates["GEMM GFLOP/s"]
        found[f"exact, {count} queries"] = each
    flat = queries[:64].flatten(1).numpy()
    found["numpy, 1 query"] = timed(lambda: plain_numpy(flat[:1], store), 1)
    for directions in (64, 256):
        asked = Linear(queries[:64], "unit")
        start = time.perf_counter()
        index = ProjectionIndex.build(store, asked, directions)
        each = {"build s": time.perf_counter() - start}
        each["index bytes"] = 4 * n * (directions + 1)
        answer = certified_search(asked, store, index, K)
        each["equal to exact"] = bool(torch.equal(answer.rows, truth))
        each["part read"] = float(answer.read.mean() / n)
        ones = iter([Linear(queries[number : number + 1], "unit") for number in range(15)])

        def one(ones=ones, index=index):
            certified_search(next(ones), store, index, K)

        each |= timed(one, 15)
        found[f"certified {directions}"] = each
    found |= faiss_flat(flat, store)
    return found


def faiss_flat(queries, store):
    try:
        import faiss
    except ImportError:
        return {}
    rows = store.features("loss").reshape(len(store), -1)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return {"faiss flat, 1 query": timed(lambda: index.search(queries[:1], K), 3)}


def table(results):
    """Return the table of README.md."""
    lines = [
        "| N × T·k | search | best ms | median ms | a core: of memory's, of read()'s rate "
        "| of GEMM's | rows read |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in results:
        head = f"{each['N']:,} × {each['T'] * each['k']:,}"
        for name, value in each.items():
            if not isinstance(value, dict) or "best" not in value:
                continue
            time_ = f"{1e3 * value['best']:,.1f} | {1e3 * value['median']:,.1f}"
            rates = gemm = " "
            if "of memory" in value:
                rates = (
                    f"{value['GB/s']:.1f} GB/s: {value['of memory']:.0%}, {value['of read()']:.0%}"
                )
                gemm = f"{value['of GEMM']:.0%}"
            read = f"{value['part read']:.2%}" if "part read" in value else "all"
            lines.append(f"| {head} | {name} | {time_} | {rates} | {gemm} | {read} |")
    return "\n".join(lines) + "\n"


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3.2), sharex=True)
    for axis, each in zip(axes, results, strict=True):
        rows = [(n, v) for n, v in each.items() if isinstance(v, dict) and "best" in v]
        rows = [(n, v) for n, v in rows if "64 q" not in n and "1000 q" not in n][::-1]
        for place, (name, value) in enumerate(rows):
            color = "C1" if "certified" in name else "C0" if "exact" in name else "0.6"
            axis.barh(place, 1e3 * value["best"], color=color)
            part = f", reads {value['part read']:.1%}" if "part read" in value else ""
            axis.text(1e3 * value["best"] * 1.15, place, f"{1e3 * value['best']:,.1f} ms{part}",
                      va="center", fontsize=8)  # fmt: skip
        limit = (
            1e3
            * each["store bytes"]
            / each["machine"]["memory GB/s"]
            / 1e9
            / torch.get_num_threads()
        )
        axis.axvline(limit, color="k", ls="--", lw=1)
        axis.text(limit, len(rows) - 0.4, "reading\nthe rows", fontsize=7, ha="center", va="bottom")
        axis.set_yticks(range(len(rows)), [name.replace(", 1 queries", "") for name, _ in rows])
        axis.set_xscale("log")
        axis.set_xlim(0.3, 3e5)
        title = f"{each['N']:,} rows of {each['T'] * each['k']:,} numbers"
        axis.set_title(title, fontsize=10, pad=24)
        axis.set_xlabel("ms for one query, rows in memory")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, default=Path("outputs/search"))
    parser.add_argument("--small", action="store_true", help="a hundredth of the rows")
    options = parser.parse_args()
    here, results = Path(__file__).parent, []
    for n, times, dim in SHAPES:
        folder = options.scratch / f"{n}-{times}-{dim}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            results.append(measure(folder, n // 100 if options.small else n, times, dim))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(table(results[-1:]), flush=True)
    where = options.scratch if options.small else here
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "results": results}
    (where / "results.json").write_text(json.dumps(about, indent=1) + "\n")
    (where / "results.md").write_text(table(results))
    plot(results, where / "results.png")


if __name__ == "__main__":
    main()
