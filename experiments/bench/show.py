"""The table and the picture of results.json."""

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

HERE = Path(__file__).parent
TICKS = (0.5, 1, 2, 4, 8)
PEERS = ("bergson", "dattri", "trak")
TITLES = {
    "ddpm_cifar": "DDPM UNet",
    "sd_unet": "SD1.x-like UNet",
    "mmdit": "MMDiT, two SD3 blocks",
    "mmdit_lora": "the same, LoRA rank 4",
}
NAMES = {
    "published": "published way",
    "vmap": "vmap, block_cyclic",
    "plain_adapters": "plain, adapters only",
    "trak": "TRAK",
}
COLUMNS = (
    "way | s a gradient | × plain | median | coverage | error | cosine error | peak MiB | state"
    " | stored bytes"
)


def bytes_of(n: float) -> str:
    return "0" if not n else f"{n / 2**20:,.0f} MiB"


def row(way: str, found: dict) -> str:
    if "failed" in found:
        return f"| {NAMES.get(way, way)} | {found['failed']} |" + " |" * 8
    peaks = [found[key] / 2**20 for key in ("peak_bytes", "plain_peak_bytes") if key in found]
    cells = [
        NAMES.get(way, way),
        f"{found['seconds']:.3f}",
        f"**{found['ratio']:.2f}**",
        f"{found['median_ratio']:.2f}",
        f"{found['coverage']:.0%}" if "coverage" in found else "",
        f"{found['error']:.0e}" if "error" in found else "",
        f"{found['cosine_error']:.4f}" if "cosine_error" in found else "",
        "{:,.0f} (plain {:,.0f})".format(*peaks) if peaks else "",
        bytes_of(found["state_bytes"]) if "state_bytes" in found else "",
        f"{found['stored_bytes']:,}" if "stored_bytes" in found else "",
    ]
    return f"| {' | '.join(cells)} |"


def table(results: dict) -> str:
    blocks = []
    for workload, title in TITLES.items():
        ways = results.get(workload)
        if not ways:
            continue
        some = next(found for found in ways.values() if "parameters" in found)
        plain = min(f["plain_seconds"] for f in ways.values() if "plain_seconds" in f)
        lines = [
            f"**{title}**: {some['parameters'] / 1e6:,.1f} M attributed parameters; plain training "
            f"{plain:.3f} s a gradient at best.",
            "",
            f"| {COLUMNS} |",
            "|---" * len(COLUMNS.split("|")) + "|",
            *(row(way, f) for way, f in ordered(ways) if "failed" in f or "ratio" in f),
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def ordered(ways: dict) -> list:
    return sorted(ways.items(), key=lambda item: item[1].get("ratio", 99))


def _part(found: dict) -> str:
    """Say which share of the parameters a way reaches, where it is not all."""
    share = found.get("coverage", 1)
    return "" if share == 1 else f" ({share:.0%} of it)"


def plot(results: dict, path: Path) -> None:
    shown = [name for name in TITLES if name in results]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.4 * len(shown), 4), squeeze=False)
    for axis, workload in zip(axes[0], shown, strict=True):
        ways = [(way, f) for way, f in ordered(results[workload]) if "ratio" in f][::-1]
        ratios = [found["ratio"] for _, found in ways]
        grey = {"published", "vmap", "plain_adapters", *PEERS}
        colours = ["#b0b0b0" if way in grey else "#2166ac" for way, _ in ways]
        names = [NAMES.get(way, way) + _part(found) for way, found in ways]
        axis.barh(names, ratios, color=colours)
        for y, ratio in enumerate(ratios):
            axis.text(
                1.05 * ratio,
                y,
                f"{ratio:.2f}",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
        axis.axvline(1, color="black", lw=0.8)
        axis.set_xscale("log")
        axis.set_xlim(0.4, 2.2 * max(ratios))
        axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS], minor=False)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_title(TITLES[workload], fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("time of a gradient, as a multiple of plain training (1 = plain)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    results = json.loads((HERE / "results.json").read_text())
    plot(results, HERE / "results.png")
    readme = HERE / "README.md"
    marked = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)
    if readme.exists():
        filled = marked.sub(lambda m: m[1] + table(results) + "\n" + m[2], readme.read_text())
        readme.write_text(filled)
    print(table(results))


if __name__ == "__main__":
    main()
