"""Plots of a report; each has its message as the title, and is omitted if it has no data.

A method has one colour in all of them and on the page. Grey methods use no gradient, blue ones
compare plain gradients, the other colours use a curvature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure

from dmin.evaluation.report.results import Place, Report, Result
from dmin.runtime.colours import Colour, method_colours

PLAIN = ("grad_dot", "grad_cos", "tracin", "gas", "over_checkpoints", "random")
# precision@40: the digits' benchmark has 40 examples of the foreign source.
MAIN = ("LDS", "leave-out ρ", "mAP", "precision@40", "recall@1", "AUROC")
INK = "#17202a"
DASHES = ("-", "--", ":", "-.")  # for variants of one method in a panel


def save_all(report: Report, folder: Path) -> list[Path]:
    """Write every plot that has data; return their paths."""
    pictures = {"results.png": forest, "removal.png": removal_curves, "path.png": path}
    found, report = [], _without_mathematics(report)
    for name, draw in pictures.items():
        if (figure := draw(report)) is not None:
            figure.savefig(folder / name, dpi=95)
            found.append(folder / name)
    return found


def _without_mathematics(report: Report) -> Report:
    """Return a report whose names matplotlib does not parse as formulas (text between ``$``)."""

    def plain(row: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v.replace("$", r"\$") if isinstance(v, str) else v for k, v in row.items()}

    results = [replace(r, **plain(asdict(r))) for r in report.results]
    return replace(report, results=results, path=[plain(row) for row in report.path])


def family(result: Result) -> str:
    """Return the group of methods that a row belongs to."""
    if not result.reads:
        return "none"
    is_plain = result.method in PLAIN or result.method.startswith("dmin")
    return "gradient" if is_plain else "curvature"


def families(report: Report) -> dict[str, str]:
    """Return the family of each method of a report, in its order."""
    found: dict[str, str] = {}
    for r in report.results:
        if r.control != "reference":
            found.setdefault(r.method, family(r))
    return found


def colours(report: Report) -> dict[str, Colour]:
    """Return the colour of each method; methods that share many panels differ most."""
    known = families(report)
    first = [row["method"] for row in report.path if row["method"] in known]
    return method_colours({method: known[method] for method in (*first, *known)})


def forest(report: Report) -> Figure | None:
    """Draw the main metric of every ground truth, one row per method, with intervals, controls."""
    panels = _panels(report.results)
    rows = list(dict.fromkeys(r.name for r in report.results if not r.control))[::-1]
    if not panels or not rows:
        return None
    columns = min(6, len(panels))
    deep = -(-len(panels) // columns)
    size = (3 + 2 * columns, deep * (0.2 * len(rows) + 0.9))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(deep, columns, sharey=True, squeeze=False)
    for axis in axes.ravel()[len(panels) :]:
        axis.axis("off")
    colour = colours(report)
    for axis, (task, truth, metric) in zip(axes.ravel(), panels, strict=False):
        here = [r for r in report.results if r.place == (task, truth, metric)]
        _forest_panel(axis, here, rows, colour)
        several = len({t for own, t, _ in panels if own == task}) > 1
        name = f"{task}, {truth}" if several else task
        axis.set_title(f"{fill(name, 26)}\n{fill(metric, 26)}", fontsize=9, loc="left")
    axes[0, 0].set_yticks(range(len(rows)), rows)
    axes[0, 0].set_ylim(-0.7, len(rows) - 0.3)
    for axis in axes[:, 0]:
        axis.tick_params(axis="y", labelsize=8)
    return figure


def _forest_panel(
    axis: Any, here: Sequence[Result], rows: Sequence[str], colours: Mapping[str, Colour]
) -> None:
    for y, name in enumerate(rows):
        if y % 2 == 0:
            axis.axhspan(y - 0.5, y + 0.5, color="#f4f5f7", lw=0, zorder=0)
        r = next((r for r in here if r.name == name), None)
        if r is None:
            continue
        colour = colours[r.method].light
        axis.plot([r.low, r.high], [y, y], color=colour, lw=1.6, solid_capstyle="round", zorder=2)
        axis.plot(r.mean, y, "o", color=colour, ms=5 if r.best else 3.6, zorder=3)
        for control, marker in (("untrained", "x"), ("soft-max", "|")):
            kin = (r.method, r.tuned, control)
            for o in (o for o in here if (o.method, o.tuned, o.control) == kin):
                axis.plot(o.mean, y, marker, color=INK, ms=4, mew=0.9, zorder=3)
    for r in here:
        if r.control == "reference":
            style = "-" if r.method == "ceiling" else ":"
            axis.axvline(r.mean, color=INK, ls=style, lw=1, zorder=1)
    axis.axvline(0, color="#cccccc", lw=0.8, zorder=1)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)


def removal_curves(report: Report) -> Figure | None:
    """Draw the rise of the loss over the number of examples removed for a group of queries."""
    rows = [r for r in report.results if r.metric.startswith("union@")]
    places = list(dict.fromkeys((r.task, r.truth) for r in rows))
    if len({r.metric for r in rows}) < 2:
        return None
    figure, axes = _grid(len(places))
    for axis, place in zip(axes, places, strict=False):
        here = [r for r in rows if (r.task, r.truth) == place]
        _curves(axis, here, report.reference, colours(report))
        title = fill(f"{place[0]}: loss without the union of top k, %", 50)
        axis.set_title(title, fontsize=10, loc="left")
        axis.axhline(0, color="#cccccc", lw=0.8)
    return figure


def _curves(
    axis: Any,
    rows: Sequence[Result],
    reference: str,
    colours: Mapping[str, Colour],
    most: int = 7,
) -> None:
    """Draw metrics ``…@k`` over k: the reference, random, pixels, and the best others."""
    rows = [r for r in rows if not r.control]
    strength: dict[str, float] = {}
    for r in rows:
        strength[r.name] = strength.get(r.name, 0) + r.mean
    always = [n for n in (reference, "pixel_l2", "random") if n in strength]
    best = [n for n in sorted(strength, key=lambda n: -strength[n]) if n not in always]
    variants: dict[str, int] = {}
    for name in [*best[: most - len(always)], *always]:
        line = sorted((r for r in rows if r.name == name), key=_k)
        ks = [_k(r) for r in line]
        method = line[0].method
        variants[method] = nth = variants.get(method, -1) + 1
        colour, dash = colours[method].light, DASHES[nth % len(DASHES)]
        means = [r.mean for r in line]
        axis.plot(ks, means, marker="o", ls=dash, color=colour, ms=3, lw=1.4, label=fill(name, 40))
        axis.fill_between(
            ks, [r.low for r in line], [r.high for r in line], color=colour, alpha=0.1, lw=0
        )
    axis.set_xscale("log")
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()
    axis.set_xlabel("k", fontsize=9)
    _finish(axis)
    axis.legend(fontsize=7, frameon=False)


def _k(result: Result) -> int:
    """Return the k of a metric ``…@k``."""
    return int(result.metric.partition("@")[2].split()[0])


def path(report: Report) -> Figure | None:
    """Draw every watched metric over the damping, one line per method and power."""
    columns = dict.fromkeys(name for row in report.path for name in row)
    watched = [c for c in columns if "/" in c and c.rpartition("/")[2] in MAIN]
    if not watched:
        return None
    methods = list(dict.fromkeys(row["method"] for row in report.path))
    known = colours(report)
    figure, axes = _grid(len(watched) + 1)
    for axis, column in zip(axes, watched, strict=False):
        for method in methods:
            colour = known[method].light if method in known else INK
            points = [r for r in report.path if r["method"] == method and column in r]
            for p in dict.fromkeys(r.get("p") for r in points):
                line = [(r["alpha"], r[column]) for r in points if r.get("p") == p]
                style = {0.5: ":", 2.0: "--"}.get(p or 1.0, "-")
                label = fill(method, 26) if style == "-" else None
                axis.plot(*zip(*line, strict=True), color=colour, ls=style, lw=1.3, label=label)
        axis.set_xscale("log")
        rows = [r for r in report.results if r.name == report.reference]
        for r in [r for r in rows if "/".join(r.place) == column][:1]:
            axis.axhline(r.mean, color="#777777", ls="-.", lw=1)
        axis.set_title(fill(column.replace("/", ", "), 50), fontsize=10, loc="left")
        axis.set_xlabel("α, damping in mean eigenvalues", fontsize=9)
        _finish(axis)
    last, (handles, labels) = axes[len(watched)], axes[0].get_legend_handles_labels()
    last.axis("off")
    last.set_visible(True)
    note = f"solid p = 1, dotted p = ½, dashed p = 2\ndash-dotted: {fill(report.reference, 40)}"
    sizes = {"fontsize": 8, "title_fontsize": 8}
    last.legend(handles, labels, title=note, frameon=False, ncols=2, **sizes)
    return figure


def _panels(results: Sequence[Result]) -> list[Place]:
    """Return the main metric of every ground truth."""
    found: dict[tuple[str, str], Place] = {}
    for r in results:
        if r.metric in MAIN or r.metric.startswith(("removal@", "union@")):
            found.setdefault((r.task, r.truth), r.place)
    return list(found.values())


def _grid(count: int) -> tuple[Figure, list[Any]]:
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes


def _finish(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#eeeeee", lw=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
