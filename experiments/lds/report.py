"""The table and the plots of the experiment; `python report.py quick` draws them again."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

COLUMNS = [
    ("LDS", "generated"),
    ("LDS", "heldout"),
    ("removal %", "generated"),
    ("removal %", "heldout"),
    ("foreign mAP", "test"),
    ("P@10", "generated"),
    ("P@10", "heldout"),
    ("recall@1", "noisy"),
    ("popularity", "heldout"),
]
SHADES = {
    "spectral": "#2457a8",
    "spectral_energy": "#111111",
    "z_sum": "#b03030",
    "trak": "#5b8e7d",
    "relative_if": "#8fbf9f",
    "renormalised_if": "#c5dccd",
    "d_trak": "#7b6fb0",
    "das": "#e07b39",
}
COLOURS = {"none": "#9aa0a6", "gradient": "#5b8e7d", "curvature": "#2457a8", "control": "#d8b15a"}
NO_GRADIENT = ("random", "pixel_l2", "pixel_cosine", "gaussian_kernel", "ssim")
PLAIN = ("grad_dot", "grad_cos", "dmin")


def find(rows: list[dict], method: str, metric: str, kind: str) -> dict | None:
    key = (method, metric, kind)
    return next((r for r in rows if (r["method"], r["metric"], r["queries"]) == key), None)


def methods(rows: list[dict]) -> list[str]:
    return [m for m in dict.fromkeys(r["method"] for r in rows) if m not in ("ceiling", "one seed")]


def family(method: str) -> str:
    """Return the colour group of a method."""
    if "," in method or "(" in method:
        return "control"
    return "none" if method in NO_GRADIENT else "gradient" if method in PLAIN else "curvature"


def table(rows: list[dict], settings: dict) -> str:
    """Return the Markdown table; * marks an LDS whose paired difference from DMin is not zero."""
    head = [f"{metric}<br>{kind}" for metric, kind in COLUMNS]
    lines = [f"| method | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for method in ["ceiling", "one seed", *methods(rows)]:
        cells = []
        for metric, kind in COLUMNS:
            r = find(rows, method, metric, kind)
            if r is None:
                cells.append("")
                continue
            half = (r["high"] - r["low"]) / 2
            digits = 1 if metric == "removal %" else 2 if metric != "P@10" else 3
            text = f"{r['mean']:.{digits}f}" + (f" ±{half:.{digits}f}" if half else "")
            paired = find(rows, method, "LDS − DMin", kind) if metric == "LDS" else None
            if paired and method != "dmin" and not paired["low"] <= 0 <= paired["high"]:
                text += "*"
            cells.append(text)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "| chosen on the tune queries | α | p | fit, s |", "|---|---|---|---|"]
    lines += [f"| {n} | {a:g} | {p:g} | {s:.0f} |" for n, (a, p, s) in settings.items()]
    return "\n".join(lines) + "\n"


def plot_table(rows: list[dict], path: Path) -> None:
    """Draw LDS with intervals and ceiling, removal, and foreign detection, a row a method."""
    panels = [
        ("LDS", "generated"),
        ("LDS", "heldout"),
        ("removal %", "generated"),
        ("removal %", "heldout"),
        ("foreign mAP", "test"),
    ]
    names = methods(rows)[::-1]
    figure = Figure(figsize=(15, 0.25 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (metric, kind) in zip(axes, panels, strict=True):
        for y, name in enumerate(names):
            r = find(rows, name, metric, kind)
            if r is None:
                continue
            axis.barh(y, r["mean"], 0.75, color=COLOURS[family(name)])
            axis.plot([r["low"], r["high"]], [y, y], color="#333333", lw=1)
        for name, style in (("ceiling", "-"), ("one seed", ":")):
            r = find(rows, name, metric, kind)
            if r is not None:
                axis.axvline(r["mean"], color="#b03030", ls=style, lw=1.2, label=name)
        axis.set_title(f"{metric}, {kind} queries", fontsize=10, loc="left")
        axis.grid(axis="x", color="#e5e5e5", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0].set_ylim(-0.6, len(names) - 0.4)
    axes[0].legend(fontsize=8, frameon=False, loc="upper right")
    figure.savefig(path, dpi=130)


def plot_path(path_rows: list[dict], rows: list[dict], path: Path) -> None:
    """Draw every measure along the damping, a line a method and power; dashes are DMin's."""
    panels = ["LDS tune", "test mAP", "LDS generated", "LDS heldout", "P@10 heldout"]
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    lines = dict.fromkeys((r["method"], r["p"]) for r in path_rows)
    styles = {0.5: ":", 1.0: "-", 2.0: "--"}
    for axis, panel in zip(axes[:5], panels, strict=True):
        for method, p in lines:
            points = [r for r in path_rows if (r["method"], r["p"]) == (method, p)]
            axis.plot(
                [r["alpha"] for r in points],
                [r[panel] for r in points],
                color=SHADES[method],
                ls=styles[p],
                lw=1.4,
                label=f"{method}, p={p:g}" if method[0] in "sz" else method,
            )
        metric, _, kind = panel.partition(" ")
        if panel != "LDS tune":
            key = ("foreign mAP", "test") if panel == "test mAP" else (metric, kind)
            axis.axhline(find(rows, "dmin", *key)["mean"], color="#777777", ls="-.", lw=1)
        axis.set_xscale("log")
        axis.set_title(panel, fontsize=10, loc="left")
        axis.set_xlabel("α, damping in mean eigenvalues", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[5].axis("off")
    axes[5].legend(handles, labels, loc="center left", fontsize=9, frameon=False, ncols=2)
    figure.savefig(path, dpi=130)


def read(path: Path) -> list[dict]:
    """Read a CSV, numbers as numbers."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    words = ("method", "queries", "metric", "note")
    return [{k: v if k in words else float(v) for k, v in row.items()} for row in rows]


if __name__ == "__main__":
    folder = Path(__file__).parent / sys.argv[1]
    results = read(folder / "results.csv")
    plot_table(results, folder / "lds.png")
    plot_path(read(folder / "path.csv"), results, folder / "path.png")
