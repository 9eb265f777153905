"""Everything that needs a GPU, by one command: `make gpu`. Results go to gpu.json, step by step.

python experiments/bench/gpu.py                  # all of it; goes on where it was stopped
python experiments/bench/gpu.py bench            # one step: tests, bench, kernels, scan, flux
python experiments/bench/gpu.py scan --device cpu --small   # a trial of the script, kept nowhere
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import ways
from torch import Tensor
from workloads import WORKLOADS, Workload, build, times

from dmin.attribution import DMin, retrieve
from dmin.gradients.factors import Outer
from dmin.gradients.parameters import Parameter, Parameters
from dmin.sketches import BlockCyclic, TensorSketch
from dmin.sketches.backends import installed
from dmin.store import Layout, Manifest, Rows, Store, StoreWriter

HERE = Path(__file__).parent
ROOT, RESULTS = HERE.parents[1], HERE / "gpu.json"
STEPS = "tests", "kernels", "bench", "scan", "flux"
BATCH, REPEATS = 8, 5


def tests(device: str, small: bool) -> dict:
    """Run the tests that need a GPU; the summary is kept whatever it says."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", str(ROOT / "tests")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout, flush=True)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": lines[-1] if lines else "", "failed": failed}


def bench(device: str, small: bool) -> dict:
    """Time collecting beside plain training in the same run, in bf16, batch 8."""
    found = {}
    for name in ("mmdit",) if small else (*WORKLOADS, "sd3_medium"):
        workload = sd3_medium() if name == "sd3_medium" else build(name)
        moved(workload, device, 2 if small else BATCH)
        plain = ways.PlainAdapters(workload) if name == "mmdit_lora" else ways.Plain(workload)
        for way, make in WAYS.items():
            try:
                work = make(workload)
                found[f"{name}/{way}"] = compared(work, plain, device, len(workload.target))
                del work
            except torch.OutOfMemoryError as error:
                found[f"{name}/{way}"] = {"failed": str(error).splitlines()[0]}
            print(name, way, found[f"{name}/{way}"], flush=True)
        del workload, plain
    return found


def sd3_medium() -> Workload:
    """SD3-medium's transformer at its full depth, 512² pixels: 1024 image and 77 text tokens."""
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=64,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )
    x = torch.randn(4, 16, 64, 64)
    arguments = {"hidden_states": x, "timestep": times().float()}
    arguments["encoder_hidden_states"] = torch.randn(4, 77, 4096)
    arguments["pooled_projections"] = torch.randn(4, 2048)
    return Workload(network, arguments, torch.randn_like(x))


def moved(workload: Workload, device: str, batch: int) -> None:
    """Bring a workload to the device, in bf16, its batch repeated to the size wanted."""

    def there(x: Tensor) -> Tensor:
        x = x.repeat(-(-batch // len(x)), *[1] * (x.ndim - 1))[:batch]
        return x.to(device, torch.bfloat16 if x.is_floating_point() else x.dtype)

    workload.network.to(device, torch.bfloat16)
    workload.arguments = {name: there(x) for name, x in workload.arguments.items()}
    workload.target = there(workload.target)


class Published(ways.Published):
    """The published way, with its permutation and signs on the device, as it has them."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        device = workload.target.device
        self.permutation, self.signs = self.permutation.to(device), self.signs.to(device)

    def __call__(self) -> Tensor:
        rows = []
        for b in range(len(self.workload.target)):
            loss = self.workload.losses(slice(b, b + 1)).sum()
            gradients = torch.autograd.grad(loss, list(self.chosen.values()))
            flat = torch.cat([g.flatten() for g in gradients])
            flat = torch.nn.functional.pad(flat, (0, self.padded - len(flat)))
            rows.append((flat[self.permutation] * self.signs).view(ways.K, -1).sum(1))
        return torch.stack(rows)


def ours(family: str, kernels: str) -> Callable[[Workload], ways.Ours]:
    def make(workload: Workload) -> ways.Ours:
        made = ways.Ours(workload, family)
        made.sketch.kernels = kernels
        return made

    return make


WAYS: dict[str, Callable[[Workload], Callable]] = {
    "auto": ours("auto", "auto"),
    "auto, torch alone": ours("auto", "torch"),
    "block_cyclic": ours("block_cyclic", "auto"),
    "published": Published,
}


def compared(work: Callable, plain: Callable, device: str, batch: int) -> dict:
    """Time some work and plain training in turn; then the peak memory of each."""
    work(), plain(), work(), plain()
    pairs = [(timed(work, device), timed(plain, device)) for _ in range(REPEATS)]
    mine, theirs = zip(*pairs, strict=True)
    found = {
        "seconds": min(mine) / batch,
        "plain_seconds": min(theirs) / batch,
        "ratio": min(mine) / min(theirs),
        "median_ratio": statistics.median(a / b for a, b in pairs),
    }
    if device == "cuda":
        for name, each in (("peak_bytes", work), ("plain_peak_bytes", plain)):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            each()
            torch.cuda.synchronize()
            found[name] = torch.cuda.max_memory_allocated() - before
    return found


def timed(work: Callable, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


SHAPES = {"1536 x 1536": (1536, 1536), "1536 x 6144": (6144, 1536), "3072 x 12288": (12288, 3072)}


def kernels(device: str, small: bool) -> dict:
    """Time one Linear layer of 1024 positions a pass: by Triton, and by torch alone."""
    found = {}
    positions, batch = (64, 2) if small else (1024, BATCH)
    for label, (out, width) in list(SHAPES.items())[: 1 if small else None]:
        for name, sketch, transforms in (
            ("block-cyclic fold", BlockCyclic(4096), False),
            ("tensor sketch, formed", TensorSketch(4096), False),
            ("tensor sketch, transformed", TensorSketch(4096), True),
        ):
            bound = sketch.bind(Parameters((Parameter("w", (out, width)),)))
            bound._transforms_are_cheaper = lambda *_, cheaper=transforms: cheaper
            d, a = (
                torch.randn(batch, positions, n, device=device).bfloat16() for n in (out, width)
            )
            like, factors, each = torch.zeros((), device=device), Outer(d, a), {}

            def work(bound=bound, factors=factors, like=like) -> None:
                state = bound.begin(factors.batch, like, 512 << 20)
                bound.add(state, "w", factors)
                bound.finish(state)

            for way in ("auto", "torch"):
                bound.kernels = way
                work(), work()
                each[way] = min(timed(work, device) for _ in range(REPEATS)) / batch
            form = lambda d=d, a=a: Outer(d, a).dense()  # noqa: E731
            form()
            each["forming alone"] = min(timed(form, device) for _ in range(REPEATS)) / batch
            found[f"{label}, {name}"] = each
            print(label, name, each, flush=True)
    return found


def scan(device: str, small: bool) -> dict:
    """Time exact search in 100,000 rows of 4,096 numbers in half precision."""
    count, dim = (2000 if small else 100_000), 4096
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        stores = []
        for name, rows in (("train", count), ("queries", 64)):
            layout = Layout(("loss",), 1, (500.0,), ("model",), dim, "float16")
            manifest = Manifest(layout, {"weights": "random"}, {"name": name}, rows, 1000)
            with StoreWriter(Path(folder) / name, manifest) as writer:
                for block in writer.pending():
                    n = len(manifest.block_rows(block))
                    values = generator.standard_normal((n, 1, 1, 1, dim), np.float32)
                    ids = [f"{name}-{block}-{i}" for i in range(n)]
                    ones = np.ones((n, 1, 1, 1), np.float32)
                    facts = [{}] * n, {"loss": values}, {"loss": ones}, ones[..., 0]
                    writer.append(block, Rows(ids, *facts))
            stores.append(Store(Path(folder) / name))
        train, queries = stores
        found = {}
        for where in dict.fromkeys(("cpu", device)):
            work = lambda where=where: retrieve(queries, train, DMin(), 10, device=where)  # noqa: E731
            work()
            seconds = min(timed(work, device) for _ in range(REPEATS))
            found[where] = {"seconds": seconds, "rows": count, "queries": 64}
            print(where, found[where], flush=True)
    return found


def flux(device: str, small: bool) -> dict:
    """Run the Flux-dev transformer at full depth, beside plain training where that fits."""
    depth = ["0", "1"] if small else ["19", "38"]
    command = ["experiments/flux_scale/run.py", "--device", device, "--dtype", "bfloat16"]
    command += ["--double", depth[0], "--single", depth[1]]
    command += ["--image", "1024", "--text", "512"]
    for more in ([], ["--no-plain"]):
        done = subprocess.run(
            [sys.executable, *command, *more], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        found: dict = {"command": " ".join(["python", *command, *more])}
        if done.returncode == 0:
            return found | json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"failed": done.returncode}


def machine(device: str) -> dict:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {"device": name, "torch": torch.__version__, "triton": installed()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", help=", ".join(STEPS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a trial: small, and kept nowhere")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "make gpu needs a GPU that torch can use, and torch.cuda.is_available() is false here. "
            "Install torch for CUDA, or try the script by --device cpu --small."
        )
    if unknown := set(args.steps) - set(STEPS):
        sys.exit(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}.")
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for step in args.steps or STEPS:
        if step in found and not args.again and not args.small:
            continue
        print(f"{step} ...", flush=True)
        found[step] = globals()[step](args.device, args.small)
        if not args.small:
            found["machine"] = machine(args.device)
            new = RESULTS.with_suffix(".new")
            new.write_text(json.dumps(found, indent=1) + "\n")
            os.replace(new, RESULTS)
    failed = found.get("tests", {}).get("failed") or found.get("flux", {}).get("failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
