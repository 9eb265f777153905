"""The picture of the table: error over k, and error against cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TITLES = {"unet": "UNet, digits", "dit": "DiT, digits", "mmdit": "MMDiT, captioned shapes"}
STYLE = {
    "block_cyclic": ("#1f5fa8", "o", "block_cyclic"),
    "tensor_sketch": ("#0f8a6a", "s", "tensor_sketch"),
    "tensor_sketch_independent": ("#8cc7b5", "s", "tensor_sketch as published"),
    "oporp": ("#5b4fa3", "D", "oporp"),
    "sjlt": ("#b0569b", "^", "sjlt"),
    "mask_sjlt": ("#d08a1d", "v", "mask_sjlt"),
    "factored": ("#c0392b", "X", "factored"),
    "gaussian": ("#555555", "*", "gaussian"),
}
COMPARED = 4096


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    figure = Figure((13, 7.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    kinds = list(TITLES)
    for column, kind in enumerate(kinds):
        mine = [line for line in lines if line["model"] == kind]
        errors, costs = axes[0, column], axes[1, column]
        if not mine:
            errors.set_title(f"{TITLES[kind]}: not measured")
            errors.set_axis_off()
            costs.set_axis_off()
            continue
        for family, (colour, marker, label) in STYLE.items():
            rows = [line for line in mine if line["sketch"] == family]
            if not rows:
                continue
            ks, rmse = [r["k"] for r in rows], [float(r["rmse"]) for r in rows]
            errors.loglog(ks, rmse, color=colour, marker=marker, ms=5, lw=1.6, label=label)
            timed = [r for r in rows if r["ratio_to_plain"] and r["k"] == COMPARED]
            for row in timed:
                x, y = float(row["ratio_to_plain"]), float(row["rmse"])
                costs.plot(x, y, color=colour, marker=marker, ms=9, ls="")
        ks = sorted({line["k"] for line in mine})
        errors.loglog(ks, [k**-0.5 for k in ks], color="#999999", ls=":", label="1/√k")
        errors.set_xticks(ks[::2], [f"2^{k.bit_length() - 1}" for k in ks[::2]])
        errors.minorticks_off()
        count = mine[0]["parameters"]
        errors.set_xlabel("k")
        errors.set_title(f"{TITLES[kind]} ({count / 1e6:.2f} M parameters)", fontsize=11)
        costs.set(
            yscale="log",
            ylim=(6e-3, 0.15),
            xlabel="time, relative to plain training on the same batch",
        )
        costs.set_title(f"k = {COMPARED}", fontsize=10)
        costs.axvline(1, color="#bbbbbb", lw=1, zorder=0)
        costs.set_xlim(left=0)
        for axis in (errors, costs):
            axis.grid(True, which="major", color="#e6e6e6", lw=0.7)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
    for row in axes:
        row[0].set_ylabel("rmse of the cosine")
    found = [axis.get_legend_handles_labels() for axis in axes[0]]
    named = {name: line for lines, names in found for line, name in zip(lines, names, strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=9)
    figure.savefig(path)
