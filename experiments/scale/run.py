"""What collecting and searching take from 10⁴ to 10⁸ examples, 36 M to 12 B parameters. README.md.

Nothing is measured here. Rates come from the results of other experiments where these stand beside
this one (*measured*), else from ASSUMED; everything else is arithmetic (*computed*).

    python experiments/scale/run.py [--mfu 0.35] [--gpu-tflops 989] [--k 4096] [--timesteps 10] ...
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from dmin.runtime.escape import write_csv
from experiments.record import recorded

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "scale.md"
EXAMPLES = (10**4, 10**5, 10**6, 10**7, 10**8)
GPUS = (1, 8, 64, 1024)
DAY = 86400.0


class Model(NamedTuple):
    """A network and its encoders; FLOP count both operations of a multiply-add."""

    name: str
    parameters: float
    forward: float  # FLOP of one forward pass of one example
    encode: float  # FLOP of VAE and text encoders, once an example
    encoded: float  # bytes of latents and embeddings on disk, an example


# Forward: published counts for the UNets; 2 × Σ tokens × parameters that each token meets, for the
# transformers. Encoded: float32 for SD 1.5, bfloat16 for the others.
MODELS = (
    Model("DDPM CIFAR-10, 36 M", 36e6, 12e9, 0, 0),
    Model("SD 1.5, 860 M, 512²", 860e6, 0.68e12, 1.1e12, 4 * (4 * 64**2 + 77 * 768)),
    Model("SDXL, 2.6 B, 1024²", 2.57e9, 6e12, 4.6e12, 2 * (4 * 128**2 + 77 * 2048 + 1280)),
    Model("SD 3, 2.0 B, 1024²", 2.0e9, 10e12, 8e12, 2 * (16 * 128**2 + 333 * 4096 + 2048)),
    Model("Flux, 12 B, 1024²", 11.9e9, 60e12, 9.4e12, 2 * (16 * 128**2 + 512 * 4096 + 768)),
)

ASSUMED = {
    "ratio": (1.5, "a pass costs this times plain training (forward, backward, weight gradients)"),
    "scan": (6.0e9, "bytes of rows a second that one core scores for one query"),
}


class Rate(NamedTuple):
    """A number and where it is from."""

    value: float
    label: str


class Row(NamedTuple):
    """One model, number of examples and number of GPUs."""

    model: str
    examples: int
    gpus: int
    seconds: float
    store: float
    encodings: float
    gpu_memory: float
    query: float
    breaks: str


def measured(name: str) -> Rate:
    """Return a rate from another experiment's results, or what is assumed."""
    assumed = ASSUMED[name][0]
    try:
        if name == "scan":
            value, where = _scan()
            return Rate(value, f"measured ({where})")
        value, where = _ratio()
        # A GPU folds by other means than a CPU does: what one costs says little of the other.
        return Rate(assumed, f"assumed, no GPU was measured; {value:.2f} is ({where})")
    except (OSError, KeyError, ValueError, StopIteration, statistics.StatisticsError):
        return Rate(assumed, "assumed")


def _ratio() -> tuple[float, str]:
    """Return the median over the bench's networks of the cheapest sketch's cost of a pass."""
    found = json.loads((HERE.parent / "bench" / "results.json").read_text())
    skip = ("plain", "published", "vmap", "none")
    best = [
        min(way["ratio"] for name, way in ways.items() if "ratio" in way and name not in skip)
        for network, ways in found.items()
        if network != "machine" and not network.endswith("_lora")
    ]
    return statistics.median(best), "experiments/bench, float32 on a CPU"


def _scan() -> tuple[float, str]:
    """Return bytes a second and core of exact search, one query, from the largest store."""
    document = json.loads((HERE.parent / "retrieval" / "results.json").read_text())
    text = json.dumps(document)
    rates = [float(rate) for rate in re.findall(r'"GB/s": ([\d.]+)', text)]
    return 1e9 * max(rates), "experiments/retrieval, a CPU core"


def limits(row: Row, options: argparse.Namespace) -> list[tuple[float, str]]:
    """Return how far a setting is beyond each limit (1 is at it), in the order they are met."""
    return [
        (row.gpu_memory / options.gpu_bytes, "GPU memory"),
        (row.gpus / (row.examples / 32), "fewer blocks than GPUs"),
        (row.encodings / options.disk, "encodings fill the disk"),
        (row.seconds / (30 * DAY), "more than 30 days"),
        (row.store / options.disk, "the store fills the disk"),
        (row.store / (64 * 2**20) / 1e5, "files: over 100,000"),
        (row.examples * 400 / options.host_bytes, "ids and metadata in memory"),
        (row.query / 10, "a query takes over 10 s"),
    ]


def compute(options: argparse.Namespace, ratio: float, scan: float) -> list[Row]:
    """Return the whole table."""
    rows = []
    for model in MODELS:
        # Small networks do not fill a GPU.
        mfu = options.mfu if model.parameters > 1e8 else options.mfu / 4
        flop = options.timesteps * 3 * model.forward * ratio + model.encode
        for examples in EXAMPLES:
            store = examples * options.timesteps * (2 * options.k + 12)
            for gpus in GPUS:
                row = Row(
                    model.name,
                    examples,
                    gpus,
                    examples * flop / (gpus * options.gpu_tflops * 1e12 * mfu),
                    store,
                    examples * model.encoded,
                    2 * model.parameters + (512 << 20),
                    store / (options.read if store > options.host_bytes else scan * options.cores),
                    "",
                )
                over = [what for times, what in limits(row, options) if times > 1]
                rows.append(row._replace(breaks=", ".join(over) or "nothing"))
    return rows


def size(value: float) -> str:
    """Say bytes as people do."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} PB"


def span(seconds: float) -> str:
    """Say a time as people do."""
    for unit, length in (("years", 365 * DAY), ("days", DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:.2g} s"


def markdown(rows: list[Row]) -> str:
    """Return a line for each model and number of examples, GPUs across."""
    head = ["examples", *(f"{g:,} GPU{'s' * (g > 1)}" for g in GPUS), "store", "encodings"]
    head += ["a query", "breaks on 8 GPUs, the first first", "on 1,024"]
    lines = []
    for model in MODELS:
        lines += [f"\n**{model.name}**\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for examples in EXAMPLES:
            found = {r.gpus: r for r in rows if (r.model, r.examples) == (model.name, examples)}
            cells = [f"{examples:,}", *(span(found[g].seconds) for g in GPUS)]
            any_ = found[8]
            cells += [size(any_.store), size(any_.encodings) if any_.encodings else "none"]
            cells += [span(any_.query), any_.breaks, found[1024].breaks]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Draw GPU time and bytes against the number of examples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    time, space = figure.subplots(1, 2)
    for number, model in enumerate(MODELS):
        mine = [r for r in rows if r.model == model.name and r.gpus == 1]
        x = [r.examples for r in mine]
        time.loglog(x, [r.seconds / DAY for r in mine], "o-", ms=3, color=f"C{number}")
        time.text(x[-1] * 1.3, mine[-1].seconds / DAY, model.name.partition(",")[0], fontsize=8,
                  va="center", color=f"C{number}")  # fmt: skip
        if model.encoded:
            space.loglog(x, [r.encodings / 1e12 for r in mine], "o--", ms=3, color=f"C{number}")
            space.text(x[-1] * 1.3, mine[-1].encodings / 1e12, model.name.partition(",")[0],
                       fontsize=8, va="center", color=f"C{number}")  # fmt: skip
    space.loglog(x, [r.store / 1e12 for r in mine], "o-", ms=3, color="black")
    space.text(x[-1] * 1.3, mine[-1].store / 1e12, "store", fontsize=8, va="center")
    time.set_title("GPU days to collect (computed)", loc="left", fontsize=10)
    space.set_title("TB: store, and encodings until it is complete", loc="left", fontsize=10)
    for axis in (time, space):
        axis.set_xlabel("examples", fontsize=9)
        axis.set_xlim(8e3, 2e9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=130)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return what is assumed of the machines: the command's, or what is given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu-tflops", type=float, default=989, help="peak, bf16 (H100 SXM)")
    parser.add_argument("--mfu", type=float, default=0.35, help="share of it that is reached")
    parser.add_argument("--gpu-bytes", type=float, default=80e9)
    parser.add_argument("--host-bytes", type=float, default=256e9)
    parser.add_argument("--disk", type=float, default=30e12, help="bytes for store and encodings")
    parser.add_argument("--read", type=float, default=6e9, help="bytes a second from that disk")
    parser.add_argument("--cores", type=int, default=32, help="that search")
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--timesteps", type=int, default=10)
    return parser.parse_args(arguments)


def computed(options: argparse.Namespace) -> tuple[list[Row], str]:
    """Return all rows, and the page's table of them and what they were computed from."""
    ratio, scan = measured("ratio"), measured("scan")
    rows = compute(options, ratio.value, scan.value)
    used = "\n".join(
        f"| {what} | {value} | {label} |"
        for what, value, label in (
            ("a pass, × plain training", f"{ratio.value:.2f}", ratio.label),
            ("search, bytes a second and core", size(scan.value), scan.label),
            ("cores that search", f"{options.cores}", "assumed"),
            ("peak of a GPU", f"{options.gpu_tflops:g} TFLOP/s", "assumed: H100 SXM, bfloat16"),
            ("share of it reached", f"{options.mfu:g}, a quarter of it for 36 M", "assumed"),
            ("memory of a GPU, a host", f"{size(options.gpu_bytes)}, {size(options.host_bytes)}",
             "assumed"),
            ("disk", f"{size(options.disk)}, {size(options.read)} a second", "assumed"),
            ("numbers an example", f"{options.timesteps} × {options.k:,}, float16", "chosen"),
            ("FLOP of a forward pass", "by model, in run.py", "assumed: published, or computed"),
            ("all else", "", "computed"),
        )
    )  # fmt: skip
    return rows, f"| | | |\n|---|---|---|\n{used}\n{markdown(rows)}"


def page(table: str) -> str:
    """Return the page with this table."""
    text = PAGE.read_text()
    start, end = "<!-- table -->\n", "\n<!-- /table -->"
    return text.partition(start)[0] + start + table + end + text.partition(end)[2]


def main() -> None:
    rows, table = computed(options())
    write_csv(HERE / "results.csv", (row._asdict() for row in rows))
    plot(rows, HERE / "results.png")
    PAGE.write_text(page(table))
    print(table)


if __name__ == "__main__":
    with recorded(__file__):
        main()
