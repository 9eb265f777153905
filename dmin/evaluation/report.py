"""Benchmark results as a tidy CSV, a Markdown table, a terminal table and a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from dmin.evaluation.benchmark import Result

COLOURS = ("#9aa0a6", "#c9a227", "#e07b39", "#5b8e7d", "#7b6fb0", "#2457a8")


def save_csv(results: Sequence[Result], path: str | Path) -> None:
    """Write one line for each task, method and metric, with its 95 % interval."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "method", "metric", "queries", "mean", "low", "high"])
        for r in results:
            numbers = [f"{value:.4f}" for value in r.estimate]
            writer.writerow([r.task, r.method, r.metric, r.queries, *numbers])


def markdown(results: Sequence[Result]) -> str:
    """Return a Markdown table for each task: methods down, metrics across."""
    parts = []
    for task, rows in _by_task(results).items():
        metrics = list(dict.fromkeys(r.metric for r in rows))
        parts.append(f"### {task} ({rows[0].queries} queries)\n")
        parts.append(f"| method | {' | '.join(metrics)} |")
        parts.append(f"|---|{'---|' * len(metrics)}")
        for method in dict.fromkeys(r.method for r in rows):
            cells = [_cell(rows, method, metric) for metric in metrics]
            parts.append(f"| {method} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def tables(results: Sequence[Result]) -> list[Table]:
    """Return the same tables for the terminal, with half the width of each interval."""
    out = []
    for task, rows in _by_task(results).items():
        table = Table(title=f"{task} ({rows[0].queries} queries)", title_justify="left")
        table.add_column("method")
        metrics = list(dict.fromkeys(r.metric for r in rows))
        for metric in metrics:
            table.add_column(metric, justify="right")
        for method in dict.fromkeys(r.method for r in rows):
            table.add_row(method, *(_short_cell(rows, method, metric) for metric in metrics))
        out.append(table)
    return out


def save_plot(results: Sequence[Result], path: str | Path) -> None:
    """Draw every task as a group of bars, one a method, with intervals, and write a PNG."""
    tasks = _by_task(results)
    figure = Figure(figsize=(9, 2.6 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    for axis, (task, rows) in zip(axes, tasks.items(), strict=True):
        metrics = list(dict.fromkeys(r.metric for r in rows))
        methods = list(dict.fromkeys(r.method for r in rows))
        width = 0.8 / len(methods)
        for number, method in enumerate(methods):
            chosen = [next(r for r in rows if (r.method, r.metric) == (method, m)) for m in metrics]
            means = [r.estimate.mean for r in chosen]
            errors = [
                [r.estimate.mean - r.estimate.low for r in chosen],
                [r.estimate.high - r.estimate.mean for r in chosen],
            ]
            places = [i + (number - (len(methods) - 1) / 2) * width for i in range(len(metrics))]
            colour = COLOURS[number % len(COLOURS)]
            axis.bar(places, means, width * 0.92, color=colour, label=method)
            axis.errorbar(places, means, errors, fmt="none", ecolor="#333333", elinewidth=0.8)
        axis.set_title(f"{task} ({rows[0].queries} queries)", loc="left", fontsize=10)
        axis.set_xticks(range(len(metrics)), metrics, fontsize=9)
        axis.set_ylim(0, 1.02)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    axes[0].legend(ncols=3, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)


def _by_task(results: Sequence[Result]) -> dict[str, list[Result]]:
    return {t: [r for r in results if r.task == t] for t in dict.fromkeys(r.task for r in results)}


def _short_cell(rows: Sequence[Result], method: str, metric: str) -> str:
    estimate = next(r.estimate for r in rows if (r.method, r.metric) == (method, metric))
    return f"{estimate.mean:.3f} ± {(estimate.high - estimate.low) / 2:.3f}"


def _cell(rows: Sequence[Result], method: str, metric: str) -> str:
    estimate = next(r.estimate for r in rows if (r.method, r.metric) == (method, metric))
    return f"{estimate.mean:.3f} ({estimate.low:.2f}–{estimate.high:.2f})"
