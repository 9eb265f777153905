"""How quick is every way to search, beside what the machine can do? See README.md.

Each part (a store of one size and kind, and one step on it) takes minutes and leaves a JSON; what
is there is not done again. The stores are removed when their parts are done.
"""

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
from data import Resampled, Synthetic, written

from dmin.attribution import Approximate, Certified, retrieve
from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.ranking_files import save_ranking
from dmin.attribution.search.certified_bound import ProjectionIndex
from dmin.attribution.search.contenders import best_of_all
from dmin.attribution.search.threads import in_threads
from dmin.gallery.html import save_html
from dmin.store import Store
from experiments.record import recorded

K = 10
STORES = [  # kind, N, T, k
    ("synthetic", 10_000, 4, 1024),
    ("synthetic", 100_000, 4, 1024),
    ("synthetic", 1_000_000, 4, 1024),
    ("synthetic", 10_000, 10, 4096),
    ("synthetic", 100_000, 10, 4096),
    ("real", 10_000, 4, 1024),
    ("real", 100_000, 4, 1024),
    ("real", 1_000_000, 4, 1024),
    ("real", 10_000, 10, 4096),
    ("real", 200_000, 10, 4096),
]
STEPS = ("write", "exact", "certified", "cold", "hnsw", "ivf", "batch")


BATCH, QUERIES = "real-100000-4096", 10_000


def timed(work, repeats):
    """Return milliseconds, best and median; the clock's, others may have been at work."""
    clock = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        clock.append(1e3 * (time.perf_counter() - start))
    return {"best": min(clock), "median": statistics.median(clock)}


def best_rows(linear, store):
    return best_of_all(linear, store, K)[1]


def plain_numpy(queries, store):
    """What one writes first: read a block, to float32, to unit rows, multiply, partial sort."""
    scores = []
    for start in range(0, len(store), 1024):
        rows = store.features("loss", start, start + 1024)
        rows /= np.sqrt(np.square(rows).sum((3, 4), keepdims=True))
        scores.append(queries @ rows.reshape(len(rows), -1).T)
    scores = np.concatenate(scores, axis=1)
    return np.argpartition(-scores, K, axis=1)[:, :K]


class Part:
    """One store and what is measured on it."""

    def __init__(self, kind, n, times, dim, scratch, real):
        self.name = f"{kind}-{n}-{times * dim}"
        self.kind, self.n, self.times, self.dim = kind, n, times, dim
        self.path, self.scratch, self.real = scratch / self.name, scratch, real

    def world(self):
        if self.kind == "synthetic":
            return Synthetic(self.times, self.dim)
        return Resampled(self.times, self.dim, self.real)

    def linear(self, count):
        rows = self.world().rows(count, 10**9, queries=True)[:, None, :, None]
        return InnerProduct(torch.from_numpy(np.ascontiguousarray(rows)), "unit")

    def opened(self):
        return Store(self.path)

    # steps

    def write(self):
        seconds = written(self.path, self.world(), self.n)
        time.sleep(2.5)  # so that the files are settled
        found = {"write s": seconds}
        for name in ("first opening ms", "opening ms"):
            found[name] = timed(lambda: Store(self.path).lengths("loss"), 1)["best"]
        store = self.opened()
        found["store bytes"] = sum(f.stat().st_size for f in self.path.glob("segment-*.h5"))
        found["catalog bytes"] = (self.path / "catalog.kept").stat().st_size
        return found | {"segments": len(store.segments)}

    def exact(self):
        store, asked = self.opened(), self.linear(64)
        size = self.n * store.layout.row_bytes
        spans = [(at, min(at + 2000, self.n)) for at in range(0, self.n, 2000)]

        def touch(span):
            return sum(int(v.view(np.int64).sum()) for v in store.mapped.runs("loss", *span))

        def memory():
            return list(in_threads(touch, spans, compiled=True))

        one, four = (InnerProduct(asked.queries[:count], "unit") for count in (1, 4))
        best_rows(one, store), best_rows(four, store), memory()
        repeats = 9 if size < 2e9 else 5
        rates, scans, fours = [], [], []
        for _ in range(repeats):  # one after the other: all meet the same neighbours
            rates.append(timed(memory, 1)["best"])
            scans.append(timed(lambda: best_rows(one, store), 1)["best"])
            fours.append(timed(lambda: best_rows(four, store), 1)["best"])
        a, b = torch.randn(2, 2048, 2048)
        gemm = 2 * 2048**3 / timed(lambda: a @ b, 7)["best"] / 1e6
        many = timed(lambda: best_rows(asked, store), 2 if size < 2e9 else 1)
        flops = 2 * 64 * size / 2 / many["best"] / 1e6
        found = {
            "memory GB/s": size / min(rates) / 1e6,
            "exact 1": {"best": min(scans), "median": statistics.median(scans)},
            "of memory": statistics.median(r / s for r, s in zip(rates, scans, strict=True)),
            "exact 4": {"best": min(fours), "median": statistics.median(fours)},
            "exact 64": many,
            "GEMM GFLOP/s": gemm,
            "of GEMM": flops / gemm,
        }
        flat = asked.queries.flatten(1).numpy()
        if size <= 1e10:
            found["numpy 1"] = timed(lambda: plain_numpy(flat[:1], store), 1)
        if size <= 1e9:  # it takes twice the bytes of the store, in memory
            found |= self.faiss_flat(flat, store)
        return found

    def faiss_flat(self, flat, store):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(flat.shape[1])
        start = time.perf_counter()
        for first in range(0, len(store), 8192):
            rows = store.features("loss", first, first + 8192)
            rows /= np.sqrt(np.square(rows).sum((3, 4), keepdims=True))
            index.add(rows.reshape(len(rows), -1))
        return {
            "faiss flat build s": time.perf_counter() - start,
            "faiss flat bytes": 4 * len(store) * flat.shape[1],
            "faiss flat 1": timed(lambda: index.search(flat[:1], K), 5),
            "faiss flat 64": timed(lambda: index.search(flat, K), 2),
        }

    def _searched(self, index, count=64):
        store, asked = self.opened(), self.linear(count)
        ones = [InnerProduct(asked.queries[i : i + 1], "unit") for i in range(count)]
        index.search(ones[0], store, K)
        order, read = iter(ones[1:16]), []
        found = {"1": timed(lambda: read.append(index.search(next(order), store, K).read[0]), 15)}
        found["part read"] = np.mean(read) / self.n
        found["64"] = timed(lambda: index.search(asked, store, K), 1)
        return found, index.search(asked, store, K), best_rows(asked, store), store

    def certified(self):
        store = self.opened()
        start = time.perf_counter()
        index = ProjectionIndex.build(store, InnerProduct(torch.empty(0), "unit"), 256)
        seconds = time.perf_counter() - start
        index.save(ProjectionIndex.path(store, InnerProduct(torch.empty(0), "unit"), 256))
        found, answer, truth, _ = self._searched(Certified(256))
        equal = bool(torch.equal(answer.rows, truth))
        size = sum(getattr(index, name).nbytes for name in ("codes", "directions", "residuals"))
        found |= {"build s": seconds, "bytes": size, "equal": equal}
        return {"certified": found}

    def cold(self):
        store, asked = self.opened(), self.linear(8)
        index = Certified(256)
        index.search(InnerProduct(asked.queries[:1], "unit"), store, K)
        plain, proven = [], []
        for number in range(1, 4):
            one = InnerProduct(asked.queries[number : number + 1], "unit")
            store = self.dropped(store)
            proven.append(
                timed(lambda one=one, store=store: index.search(one, store, K), 1)["best"]
            )
        store = self.dropped(store)
        plain.append(timed(lambda: best_rows(one, store), 1)["best"])
        store = self.dropped(store)
        start = time.perf_counter()
        for file in self.path.glob("segment-*.h5"):
            with open(file, "rb", buffering=0) as raw:
                while raw.read(8 << 20):
                    pass
        seconds = time.perf_counter() - start
        rate = self.n * store.layout.row_bytes / seconds / 1e9
        return {"cold": {"certified ms": proven, "exact ms": plain, "reading the files GB/s": rate}}

    def dropped(self, store):
        """Have the pages of the segments leave memory, and return the store with nothing mapped."""
        store.mapped._maps.clear()
        gc.collect()
        for file in self.path.glob("segment-*.h5"):
            with open(file, "rb") as raw:
                os.fsync(raw.fileno())
                os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return store

    def _approximate(self, **settings):
        index = Approximate(recall_queries=0, **settings)  # the truth is at hand
        store, linear = self.opened(), self.linear(1)
        start = time.perf_counter()
        index._prepare(store, linear)
        seconds = time.perf_counter() - start
        size = index.path(store, linear).stat().st_size
        found, answer, truth, _ = self._searched(index)
        pairs = zip(answer.rows.tolist(), truth.tolist(), strict=True)
        recall = float(np.mean([len({*a} & {*b}) / K for a, b in pairs]))
        return found | {"build s": seconds, "bytes": size, "recall": recall}

    def hnsw(self):
        return {"hnsw": self._approximate(factory="HNSW32", search={"efSearch": 256})}

    def ivf(self):
        return {"ivf": self._approximate(factory="IVF{cells},Flat", search={"nprobe": 32})}

    def batch(self):
        """Ten thousand queries, from two stores to files."""
        if self.name != BATCH:
            return {}
        path = self.scratch / "batch-queries"
        written(path, self.world(), QUERIES, queries=True)
        asked, store = Store(path), self.opened()
        start, cpu = time.perf_counter(), time.process_time()
        ranking = retrieve(asked, store, k=K)
        found = {"retrieve s": time.perf_counter() - start, "cpu s": time.process_time() - cpu}
        flops = 2 * QUERIES * self.n * self.times * self.dim
        found["GFLOP/s"] = flops / found["retrieve s"] / 1e9
        folder = self.scratch / "batch-answer"
        start = time.perf_counter()
        save_ranking(ranking, folder)
        found["CSV, JSON, Parquet s"] = time.perf_counter() - start
        start = time.perf_counter()
        pictures = np.random.default_rng(0).random((64, 3, 64, 64), np.float32)
        save_html(ranking, *[lambda id: pictures[hash(id) % 64]] * 2, folder / "gallery.html")
        found["HTML s"] = time.perf_counter() - start
        found["MB"] = {file.name: file.stat().st_size / 1e6 for file in folder.glob("*.*")}
        some = np.random.default_rng(0).choice(QUERIES, 20, replace=False)
        queries = asked.rows("loss", some)
        queries /= np.sqrt(np.square(queries).sum((3, 4), keepdims=True))
        best = np.sort(plain_numpy(queries.reshape(20, -1), store), axis=1)
        found["equal"] = bool(np.array_equal(best, np.sort(ranking.train_rows[some], axis=1)))
        shutil.rmtree(path), shutil.rmtree(folder)
        return {"batch": found}


def report(scratch, here):
    from report import plot, table

    results = []
    for kind, n, times, dim in STORES:
        found = {"kind": kind, "N": n, "width": times * dim}
        for step in STEPS:
            file = scratch / f"{kind}-{n}-{times * dim}.{step}.json"
            if file.exists():
                found |= json.loads(file.read_text())
        if len(found) > 3:
            results.append(found)
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__, "results": results}
    (here / "results.json").write_text(json.dumps(about, indent=1) + "\n")
    (here / "results.md").write_text(table(results))
    plot(results, here / "results.png")
    print(table(results))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, default=Path("outputs/retrieval"))
    parser.add_argument("--real", type=Path, help="folder of two stores, train and held")
    parser.add_argument("--only", default="", help="names of parts, real-1000000-4096,...")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--keep", action="store_true", help="leave the stores there")
    parser.add_argument("--small", type=int, default=1, help="divide N by this, for a trial")
    parser.add_argument("--report", action="store_true", help="only gather what is measured")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    for kind, n, times, dim in () if options.report else STORES:
        part = Part(kind, n // options.small, times, dim, options.scratch, options.real)
        wanted = not options.only or part.name in options.only.split(",")
        if not wanted or (kind == "real" and options.real is None):
            continue
        files = {step: options.scratch / f"{part.name}.{step}.json" for step in STEPS}
        for step in options.steps.split(","):
            if not files[step].exists():
                found = getattr(part, step)()
                files[step].write_text(json.dumps(found, indent=1, default=float) + "\n")
                print(part.name, step, json.dumps(found, default=float), flush=True)
        if not options.keep and all(file.exists() for file in files.values()):
            shutil.rmtree(part.path, ignore_errors=True)
    report(options.scratch, options.scratch if options.small > 1 else Path(__file__).parent)


if __name__ == "__main__":
    with recorded(__file__):
        main()
