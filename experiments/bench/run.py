"""How long does a gradient take beside plain training? See README.md.

Every part (a way on a workload) runs in a process of its own and adds to results.json; what is
there is not done again, unless --again names it.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from experiments.record import recorded

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
REPEATS, SEEDS = 4, 2
STORED = "float16"
SECONDS_A_PART = 600
NOT_INSTALLED = "not installed: see the README"


def measure(workload_name: str, way_name: str, what: str, threads: int) -> dict:
    """Time a way interleaved with plain training; then its memory and its errors.

    Args:
        workload_name: one of ``workloads.WORKLOADS``.
        way_name: as :func:`ways.build` takes it.
        what: ``timings`` (and memory), ``errors`` or ``all``.
        threads: of torch.
    """
    import ways
    from workloads import BATCH, build

    torch.set_num_threads(threads)
    workload = build(workload_name)
    plain, way = ways.Plain(workload), ways.build(way_name, workload)
    if what == "errors":
        return errors(workload, way, ways) if isinstance(way, ways.Ours) else {}
    plain(), way()
    seconds = {"plain": [], "way": []}
    for _ in range(REPEATS):
        for name, work in (("plain", plain), ("way", way)):
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(times) for name, times in seconds.items()}
    pairs = [a / b for a, b in zip(seconds["way"], seconds["plain"], strict=True)]
    found = {
        "seconds": best["way"] / BATCH,
        "plain_seconds": best["plain"] / BATCH,
        "ratio": best["way"] / best["plain"],
        "median_ratio": statistics.median(pairs),
        "threads": threads,
        "parameters": sum(p.numel() for p in ways.chosen(workload).values()),
    }

    def infer() -> None:
        with torch.no_grad():
            workload.losses()

    infer()
    inference = peak(infer)
    found["peak_bytes"] = peak(way) - inference
    found["plain_peak_bytes"] = peak(plain) - inference
    if not way_name.startswith("plain"):
        found["state_bytes"] = way.state
        found["stored_bytes"] = ways.K * torch.finfo(getattr(torch, STORED)).bits // 8
    if isinstance(way, ways.Ours):
        covered = [name for name, how in way.coverage.items() if how != "unused"]
        found["coverage"] = len(covered) / len(way.coverage)
        if what == "all":
            found |= errors(workload, way, ways)
    return found


def errors(workload, way, ways) -> dict:
    """Rows against the sketch of autograd's gradients; cosines against those of the gradients."""
    from workloads import BATCH

    rows = way()
    chosen = ways.chosen(workload)
    gradients = [
        torch.autograd.grad(workload.losses(slice(b, b + 1)).sum(), list(chosen.values()))
        for b in range(BATCH)
    ]
    named = [dict(zip(chosen, [g[None] for g in one], strict=True)) for one in gradients]
    expected = torch.cat([way.sketch.of(one)[:, 0] for one in named])
    error = (rows - expected).norm(dim=1) / expected.norm(dim=1)
    gram = torch.tensor(
        [
            [
                sum(float(torch.dot(x.flatten(), y.flatten())) for x, y in zip(g, h, strict=True))
                for h in gradients
            ]
            for g in gradients
        ]
    )
    upper = torch.triu_indices(BATCH, BATCH, 1)
    truth = (gram / gram.diag().sqrt().outer(gram.diag().sqrt()))[tuple(upper)]
    squares = []
    for seed in range(SEEDS):
        way.sketch.seed = seed
        sketch = type(way.sketch).bind(way.sketch, way.sketch.parameters)
        unit = torch.nn.functional.normalize(torch.cat([sketch.of(one)[:, 0] for one in named]))
        squares.append((((unit @ unit.T)[tuple(upper)] - truth) ** 2).mean())
    return {
        "error": float(error.max()),
        "cosine_error": float(torch.stack(squares).mean().sqrt()),
        "cosines": [float(truth.min()), float(truth.max())],
    }


def peak(work) -> int:
    """Return the resident bytes that stand at the peak of some work."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    work()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def machine(threads: int) -> dict:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    return {"processor": model, "threads": threads, "torch": torch.__version__}


def parts() -> list[tuple[str, str]]:
    """All ways on all workloads, what matters most first."""
    import show
    import ways
    from workloads import WORKLOADS

    first = ["auto", "published", "block_cyclic", "plain_adapters", "factored", "vmap"]
    names = [*first, *(name for name in ways.families() if name not in first)]
    return [
        (workload, name)
        for name in [*names, *show.PEERS]
        for workload in WORKLOADS
        if name != "plain_adapters" or workload == "mmdit_lora"
    ]


def done_already(known: dict, what: str) -> bool:
    """Whether what is asked for is there; only our ways have a coverage, and hence errors."""
    timed = known.get("failed", NOT_INSTALLED) != NOT_INSTALLED or "ratio" in known
    return timed if what == "timings" else timed and ("error" in known or "coverage" not in known)


def read() -> dict:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write(results: dict) -> None:
    new = RESULTS.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    os.replace(new, RESULTS)


def run(workload: str, way: str, args: argparse.Namespace) -> dict:
    """Measure one part in a process of its own."""
    import show

    command = [sys.executable, __file__, "--threads", str(args.threads), "--what", args.what]
    command += ["--part", workload, way]
    if way in show.PEERS:
        if not args.peers:
            return {"failed": NOT_INSTALLED}
        command = [args.peers, str(HERE / "peers.py"), workload, way, str(args.threads)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SECONDS_A_PART
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {SECONDS_A_PART} s"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1]
        return {"failed": reason[:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="workload or way, or workload/way")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no part after this")
    parser.add_argument("--peers", help="the Python of an environment with bergson, dattri, TRAK")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--what", choices=("all", "timings", "errors"), default="all",
        help="timings and memory alone, which want a quiet machine, or errors alone",
    )  # fmt: skip
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(measure(*args.part, args.what, args.threads)))
        return
    start = time.perf_counter()
    for workload, way in parts():
        known = read().get(workload, {}).get(way, {})
        wanted = args.only in ("", workload, way, f"{workload}/{way}")
        if not wanted or (done_already(known, args.what) and not args.again):
            continue
        if time.perf_counter() - start > args.seconds:
            print("out of time: the same command goes on")
            break
        print(f"{workload}/{way} ...", end=" ", flush=True)
        found = run(workload, way, args)
        results = read()
        if args.what != "all" and "failed" not in known:  # the rest of it stays
            found = known | found
        results.setdefault(workload, {})[way] = found
        results["machine"] = machine(args.threads)
        write(results)
        print(found.get("failed") or f"{found.get('ratio', math.nan):.2f} × plain", flush=True)
    import show

    show.main()


if __name__ == "__main__":
    with recorded(__file__, seeds=list(range(SEEDS)), repeats=REPEATS):
        main()
