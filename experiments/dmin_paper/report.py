"""The plot and the tables of the README, from the CSV files beside it."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

from experiments.record import recorded

HERE = Path(__file__).parent
COLOURS = {"published": "#b03030", "stratified": "#2457a8"}
METRICS = {
    "digits": ("class P@10", "noisy copy recall@1"),
    "shapes": ("source mAP", "noisy copy recall@1"),
}


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with (HERE / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> str:
    """Return the Markdown table: a line a way to collect and score."""
    lines = [
        "| model | timesteps | target | sketch, k = 4,096 | re-normalised | blind of 10 "
        "| class P@10 / source mAP | noisy copy recall@1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seen: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = tuple(
            row[k] for k in ("world", "schedule", "target", "sketch", "renormalised", "blind")
        )
        cell = f"{float(row['mean']):.3f} ({float(row['low']):.2f}–{float(row['high']):.2f})"
        seen.setdefault(key, {})[row["metric"]] = cell
    for (world, schedule, target, sketch, renormalised, blind), cells in seen.items():
        told = "noise" if target == "noise" else "ε" if world == "digits" else "velocity"
        first, second = (cells[m] for m in METRICS[world])
        yes = "yes" if renormalised == "True" else "no"
        cells_ = (world, schedule, told, sketch, yes, blind, first, second)
        lines.append(f"| {' | '.join(cells_)} |")
    return "\n".join(lines) + "\n"


def plot() -> None:
    """Draw what each timestep tells, and what re-normalisation does at smaller k."""
    steps, folds = read("timesteps"), read("renormalised")
    figure = Figure((11, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    for row, world in enumerate(("digits", "shapes")):
        for schedule, colour in COLOURS.items():
            chosen = [
                s for s in steps
                if s["world"] == world and s["schedule"] == schedule and s["target"] == "model"
            ]  # fmt: skip
            sketch = chosen[-1]["sketch"]
            chosen = [s for s in chosen if s["sketch"] == sketch]
            number = range(1, len(chosen) + 1)
            cosine = [float(s["cosine"]) for s in chosen]
            axes[row, 0].plot(number, cosine, "o-", color=colour, label=schedule)
            recall = [float(s["noisy copy recall@1"]) for s in chosen]
            axes[row, 1].plot(number, recall, "o-", color=colour, label=schedule)
        if world == "shapes":
            chosen = [s for s in steps if s["world"] == world and s["target"] == "noise"]
            chosen = [s for s in chosen if s["schedule"] == "published"]
            cosine = [float(s["cosine"]) for s in chosen]
            axes[row, 0].plot(number, cosine, "x--", color="#555", label="published, noise target")
            recall = [float(s["noisy copy recall@1"]) for s in chosen]
            axes[row, 1].plot(number, recall, "x--", color="#555", label="published, noise target")
        axes[row, 0].set(ylabel="mean cosine of two images", ylim=(-0.1, 1.05))
        axes[row, 0].axhline(0.98, color="#bbb", lw=1, ls=":")
        axes[row, 1].set(ylabel="noisy copies found by it alone", ylim=(-0.03, 1.03))
        for schedule, colour in COLOURS.items():
            for flag, style in (("False", "--"), ("True", "-")):
                chosen = [
                    f for f in folds
                    if (f["world"], f["schedule"], f["renormalised"]) == (world, schedule, flag)
                ]  # fmt: skip
                if chosen:
                    label = f"{schedule}, {'re-normalised' if flag == 'True' else 'as published'}"
                    k = [int(f["k"]) for f in chosen]
                    found = [float(f["mean"]) for f in chosen]
                    axes[row, 2].plot(k, found, style, marker=".", color=colour, label=label)
        axes[row, 2].set(ylabel="noisy copies found", xscale="log", ylim=(-0.03, 1.03))
        for column, title in enumerate(("what timesteps tell", "one timestep alone", "smaller k")):
            axes[row, column].set_title(f"{world}: {title}", loc="left", fontsize=10)
            axes[row, column].spines[["top", "right"]].set_visible(False)
            axes[row, column].legend(fontsize=7, frameon=False)
    for column, label in enumerate(
        ("step of 10, noisiest first", "step of 10", "k (numbers a step)")
    ):
        axes[1, column].set_xlabel(label)
    figure.savefig(HERE / "dmin_paper.png", dpi=110)


def shapes_table(rows: list[dict[str, str]]) -> str:
    """Return the Markdown table of what several shapes share of the noise."""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---|" * (len(columns) - 1)]
    lines += [f"| {' | '.join(row[c] for c in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Draw the plot, and put the tables into the README."""
    plot()
    readme = HERE / "README.md"
    text = readme.read_text()
    tables = {"results": table(read("results")), "shapes": shapes_table(read("shapes"))}
    for name, lines in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        text = f"{head}{start}\n{lines}{end}{tail}"
    readme.write_text(text)


if __name__ == "__main__":
    with recorded(__file__):
        main()
