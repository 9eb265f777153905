"""What does the proof on real numbers cost? This code beside that of before it. See README.md."""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np

BEFORE = "d4e0b9c"  # sums of 1,024 columns and scores in float32, one scoring, 8 √m 2⁻²⁴ as a bound
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
N, TIMES, DIM, K, ROUNDS = 10_000, 10, 1024, 10, 5
DTYPES, QUERIES = ("float16", "int8", "float32"), (1, 64)


def stores(folder, dtype):
    """Return queries and rows: clusters of unit rows, by numpy alone, so that both codes agree."""
    from dmin.store import Layout, Manifest, Rows, Store, StoreWriter

    found = []
    for name, count in (("q", max(QUERIES)), ("x", N)):
        path = folder / dtype / name
        layout = Layout(("loss",), 1, tuple(range(TIMES)), ("model",), DIM, dtype)
        manifest = Manifest(layout, {}, {"name": name}, count, min(count, 1000))
        with StoreWriter(path, manifest) as writer:
            for block in writer.pending():
                generator = np.random.default_rng([block, count])
                rows = len(manifest.block_rows(block))
                centres = np.random.default_rng(0).standard_normal((500, 1, TIMES, 1, DIM))
                noise = generator.standard_normal((rows, 1, TIMES, 1, DIM))
                values = centres[generator.integers(0, 500, rows)] + 0.7 * noise
                values /= np.linalg.norm(values, axis=-1, keepdims=True)
                ones = np.ones((rows, 1, TIMES, 1), np.float32)
                ids = [f"{name}-{block}-{row}" for row in range(rows)]
                features = {"loss": values.astype(np.float32)}
                writer.append(block, Rows(ids, [{}] * rows, features, {"loss": ones}, ones[..., 0]))
        found.append(Store(path))
    return found


def work(folder):
    """Answer lines of stdin, each a question, with seconds."""
    from dmin.attribution import DMin, FeatureSet
    from dmin.attribution.request import Request
    from dmin.attribution.search.certified import Certified
    from dmin.attribution.search.selection import Selection

    for line in sys.stdin:
        dtype, queries, way = json.loads(line)
        asked, train = stores(folder, dtype)
        method, side = DMin(), FeatureSet(train)
        method.fit(side)
        block = FeatureSet(asked).block(range(queries), method.requires)
        prepared = method.transform_query(block)
        index = Certified() if way == "certified" else None
        request = Request(side, method, K, None, Selection(), index, "cpu")
        best = []
        for _ in range(3):
            start = time.perf_counter()
            answer = request.batch(FeatureSet(asked), np.arange(queries), prepared)
            best.append(time.perf_counter() - start)
        print(json.dumps([min(best), answer.rows.tolist()]), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, default=Path("outputs/proof"))
    parser.add_argument("--work", action="store_true")
    options = parser.parse_args()
    if options.work:
        return work(options.scratch)
    scratch = options.scratch.resolve()
    code = ["git", "archive", "--format=tar", f"--prefix={BEFORE}/", BEFORE, "dmin"]
    whole = subprocess.run(code, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(whole)) as files:
        files.extractall(scratch, filter="data")
    asked = [sys.executable, __file__, "--work", "--scratch", str(scratch / "stores")]
    sides = [
        subprocess.Popen(
            asked,
            env={**os.environ, "PYTHONPATH": str(path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for path in (scratch / BEFORE, ROOT)
    ]
    results, lines = [], ["| rows as | queries | search | before ms | now ms | now / before |", ""]
    lines[1] = "|---|---|---|---|---|---|"
    for dtype in DTYPES:
        for queries in QUERIES:
            for way in ("exact", "certified"):
                seconds = []
                for _ in range(ROUNDS):  # one after the other: the machine's mood is that of both
                    for side in sides:
                        side.stdin.write(json.dumps([dtype, queries, way]) + "\n")
                        side.stdin.flush()
                        seconds.append(json.loads(side.stdout.readline()))
                before, now = (min(s for s, _ in seconds[at::2]) for at in (0, 1))
                pairs = zip(seconds[::2], seconds[1::2], strict=True)
                ratio = float(np.median([now / before for (before, _), (now, _) in pairs]))
                same = seconds[0][1] == seconds[1][1]
                results.append([dtype, queries, way, before, now, ratio, same])
                lines.append(
                    f"| {dtype} | {queries} | {way} | {1000 * before:.1f} | {1000 * now:.1f}"
                    f" | {ratio:.2f} |"
                )
                print(lines[-1], same, flush=True)
    for side in sides:
        side.stdin.close()
        side.wait()
    about = {"N": N, "numbers": TIMES * DIM, "before": BEFORE, "rounds": ROUNDS}
    names = ("dtype", "queries", "way", "before s", "now s", "median ratio", "same rows")
    named = [dict(zip(names, each, strict=True)) for each in results]
    (HERE / "proof.json").write_text(json.dumps({**about, "results": named}, indent=1) + "\n")
    (HERE / "proof.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if "--work" in sys.argv:  # by either code, the one before included
        main()
    else:
        from experiments.record import recorded

        with recorded(__file__):
            main()
