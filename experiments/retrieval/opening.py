"""How long does a store of a million rows in thousands of segments take to open? See README.md."""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np

from dmin.store import Layout, Manifest, Rows, Store, StoreWriter
from experiments.record import recorded

N, BLOCK, TIMES, DIM = 1_000_000, 250, 10, 16


def seconds(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, default=Path("outputs/opening"))
    path = parser.parse_args().scratch
    layout = Layout(("loss",), 1, tuple(range(TIMES)), ("model",), DIM, "float16")
    manifest = Manifest(layout, {}, {"name": "many segments"}, N, BLOCK)
    features = np.random.default_rng(0).standard_normal((BLOCK, 1, TIMES, 1, DIM), np.float32)
    ones = np.ones((BLOCK, 1, TIMES, 1), np.float32)
    with StoreWriter(path, manifest, segment_bytes=1) as writer:
        for block in writer.pending():
            ids = [f"image-{row:07d}.png" for row in manifest.block_rows(block)]
            metadata = [{"label": row % 10, "caption": "a word or two"} for row in range(BLOCK)]
            writer.append(
                block, Rows(ids, metadata, {"loss": features}, {"loss": ones}, ones[..., 0])
            )
    time.sleep(2.5)  # so that the files are settled
    found = {"rows": N, "segments": N // BLOCK}
    found["first opening s"], _ = seconds(lambda: Store(path))
    found["opening s"], store = seconds(lambda: Store(path))
    found["lengths and sums s"], _ = seconds(lambda: (store.lengths("loss"), store.sums("loss")))
    found["metadata of 10 rows s"], _ = seconds(lambda: store.metadata[500_000:500_010])
    found["all ids s"], _ = seconds(lambda: store.ids)
    found["catalog bytes a row"] = (path / "catalog.kept").stat().st_size / N
    print(json.dumps(found, indent=1))
    (Path(__file__).parent / "opening.json").write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(path)


if __name__ == "__main__":
    with recorded(__file__):
        main()
