"""What does a gradient of Flux-dev (11.9 B parameters) cost? See README.md.

At full depth this needs a GPU of 140 GB. On a CPU blocks of full width are measured, a few at a
time, and the whole is computed from them; the table says which figure is which.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch
from diffusers import FluxTransformer2DModel
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dmin.gradients.capture import Capture
from dmin.gradients.ownership import Ownership
from dmin.gradients.parameters import choose_parameters
from experiments.record import recorded

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
CONF = HERE.parents[1] / "conf" / "sketch"
DOUBLE, SINGLE = 19, 38  # blocks of Flux-dev
# A double block alone would leave half of itself without an effect on the loss.
DEPTHS = (0, 1), (0, 2), (1, 1)
K, T = 4096, 10
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def network(double: int, single: int, device: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    """Flux-dev's transformer at some depth, random weights made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made = FluxTransformer2DModel(
                num_layers=double, num_single_layers=single, guidance_embeds=True
            )
    finally:
        torch.set_default_dtype(before)
    return made.eval()


def batch(size: int, image: int, text: int, device: str, dtype: torch.dtype):
    """Arguments of the transformer, and a target."""
    side = int(image**0.5)
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)
    made = {
        "hidden_states": torch.randn(size, side * side, 64),
        "encoder_hidden_states": torch.randn(size, text, 4096),
        "pooled_projections": torch.randn(size, 768),
        "timestep": torch.rand(size),
        "guidance": torch.full((size,), 3.5),
    }
    made = {name: x.to(device, dtype) for name, x in made.items()}
    made |= {"img_ids": ids.view(-1, 3).to(device), "txt_ids": torch.zeros(text, 3, device=device)}
    return made, torch.randn(size, side * side, 64, device=device)


def measure(args: argparse.Namespace) -> dict:
    """Seconds and peak memory of plain training and of collecting, measured by turns."""
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    made = network(args.double, args.single, args.device, dtype)
    arguments, target = batch(args.batch, args.image, args.text, args.device, dtype)
    sketch = instantiate(OmegaConf.load(CONF / f"{args.sketch}.yaml"), dim=K)
    sketch = sketch.bind(choose_parameters(made))

    def losses() -> torch.Tensor:
        prediction = made(**arguments, return_dict=False)[0]
        return (prediction.float() - target).square().flatten(1).mean(1)

    def plain() -> None:
        losses().sum().backward()
        made.zero_grad(set_to_none=True)

    ownership = Ownership()

    def collect() -> None:
        ownership.settle(one_pass)

    def one_pass() -> None:
        with Capture(made, sketch, ownership=ownership) as capture:
            rows = capture.backward(losses())
            covered = [how != "unused" for how in capture.coverage.values()]
            found["coverage"] = sum(covered) / len(covered)
        assert torch.isfinite(rows.values).all() and rows.values.any()

    works = {"plain": plain, "collect": collect}
    if args.no_plain:
        del works["plain"]
    found: dict = {"parameters": sketch.parameters.count}
    seconds = {name: [] for name in works}
    for repeat in range(args.repeats + 1):
        for name, work in works.items():
            peak, took = measured(work, args.device)
            if repeat:  # the first compiles and warms up
                seconds[name].append(took)
                found[f"{name}_peak_bytes"] = peak
    for name, times in seconds.items():
        found[f"{name}_seconds"] = min(times) / args.batch
    return found


def measured(work, device: str) -> tuple[int, float]:
    """Return peak bytes, weights included, and seconds."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), time.perf_counter() - start
    took = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) * 1024, took


def whole(parts: dict[str, dict]) -> dict:
    """What full depth takes, from three depths: all but the blocks counts once."""
    single, singles, both = (parts[f"{double}+{single}"] for double, single in DEPTHS)
    count = network(DOUBLE, SINGLE, "meta", torch.float32).num_parameters()
    found = {"parameters": count, "raw_bytes": 4 * T * count, "stored_bytes": 2 * T * K}
    found["reduction"] = found["raw_bytes"] / found["stored_bytes"]
    for key in ("plain_seconds", "collect_seconds"):
        a_single, a_double = singles[key] - single[key], both[key] - single[key]
        found[key] = single[key] + DOUBLE * a_double + (SINGLE - 1) * a_single
    found["ratio"] = found["collect_seconds"] / found["plain_seconds"]
    return found


def table(results: dict) -> str:
    """The results as a table in which every figure says where it comes from."""
    cells = [
        "| blocks (double + single) | parameters | s a gradient, plain | collecting | × plain "
        "| peak, plain | peak, collecting | |",
        "|---" * 8 + "|",
    ]
    for key, part in results["parts"].items():
        plain, ours = part["plain_seconds"], part["collect_seconds"]
        peaks = (f"{part[f'{name}_peak_bytes'] / 1e9:.2f} GB" for name in ("plain", "collect"))
        cells.append(
            f"| {key.replace('+', ' + ')} | {part['parameters'] / 1e6:,.0f} M | {plain:.2f} "
            f"| {ours:.2f} | **{ours / plain:.2f}** | {' | '.join(peaks)} | measured |"
        )
    full = results["whole"]
    cells.append(
        f"| {DOUBLE} + {SINGLE} | {full['parameters'] / 1e6:,.0f} M | {full['plain_seconds']:.0f} "
        f"| {full['collect_seconds']:.0f} | **{full['ratio']:.2f}** | | | computed |"
    )
    sizes = (
        f"Stored for T = {T}, k = {K:,}, float16: {full['stored_bytes']:,} bytes an example; raw "
        f"float32 gradients are {full['raw_bytes'] / 1e9:,.0f} GB, {full['reduction']:,.0f} times "
        f"as many (computed)."
    )
    return "\n".join([*cells, "", sizes])


def plot(results: dict, path: Path) -> None:
    """Seconds a gradient, plain and collecting, for each depth."""
    full = results["whole"]
    shown = {f"{key.replace('+', ' + ')}\nmeasured": p for key, p in results["parts"].items()}
    shown[f"{DOUBLE} + {SINGLE}\ncomputed"] = full
    figure, axis = plt.subplots(figsize=(6, 3.2))
    for shift, name, colour in ((-0.2, "plain", "#b0b0b0"), (0.2, "collect", "#2166ac")):
        seconds = [part[f"{name}_seconds"] for part in shown.values()]
        bars = axis.bar([x + shift for x in range(len(shown))], seconds, 0.38, color=colour)
        label = {"plain": "plain training", "collect": "collecting"}[name]
        bars.set_label(label)
        axis.bar_label(bars, fmt="%.3g", fontsize=8)
    axis.set_xticks(range(len(shown)), shown)
    axis.set_yscale("log")
    axis.set_ylabel("seconds a gradient")
    axis.set_xlabel("double + single blocks of Flux-dev")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--double", type=int, help=f"double blocks, of {DOUBLE}")
    parser.add_argument("--single", type=int, help=f"single blocks, of {SINGLE}")
    parser.add_argument("--sketch", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--image", type=int, default=256, help="image tokens, a square number")
    parser.add_argument("--text", type=int, default=128, help="text tokens")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-plain", action="store_true", help="where its gradients do not fit")
    args = parser.parse_args()
    if args.double is not None:
        print(json.dumps(measure(args)))
        return
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    for double, single in DEPTHS:
        key = f"{double}+{single}"
        if key in results["parts"]:
            continue
        command = [sys.executable, __file__, "--double", str(double), "--single", str(single)]
        for name in ("sketch", "device", "dtype", "batch", "image", "text", "repeats"):
            command += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results["parts"][key] = json.loads(done.stdout.strip().splitlines()[-1])
        print(key, results["parts"][key], flush=True)
        results["settings"] = vars(args) | {"threads": torch.get_num_threads()}
        path.write_text(json.dumps(results, indent=1) + "\n")
    results["whole"] = whole(results["parts"])
    path.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, HERE / "results.png")
    readme = HERE / "README.md"
    start, _, rest = readme.read_text().partition("<!-- table -->\n")
    _, mark, end = rest.partition("<!-- /table -->")
    readme.write_text(f"{start}<!-- table -->\n{table(results)}\n{mark}{end}")
    print(table(results))


if __name__ == "__main__":
    with recorded(__file__, seed=0):
        main()
