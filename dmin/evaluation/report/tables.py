"""Results as Markdown and in a terminal: methods down, metrics across, a table for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dmin.evaluation.report.conclusions import conclusions, number, summary
from dmin.evaluation.report.results import TRANSFORMED, Report, Result

LEGEND = (
    "With half the width of the 95 % interval. **Bold**: no other method is better beyond chance, "
    "and it is itself better than {reference} beyond chance (paired differences in the same "
    "resamples). \\*: differs from {reference} beyond chance."
)


def markdown(report: Report) -> str:
    """Return the whole report as Markdown."""
    parts = ["## Which method for what\n", summary(report), ""]
    wish = ""
    for c in conclusions(report):
        if c.wish != wish:
            parts.append(f"- **{c.wish}.**")
            wish = c.wish
        parts.append(f"  - {c.where}: {c.text}")
    parts += ["", "## Tables\n", LEGEND.format(reference=report.reference), ""]
    for task in tasks(report.results):
        rows = [r for r in report.results if r.task == task]
        parts += _markdown_table(task, rows)
    if any(r.control in (*TRANSFORMED, "untrained") for r in report.results):
        parts += ["## Controls\n", *_controls(report.results)]
    parts += ["## What each takes\n", *_costs(report.results)]
    if report.left_out:
        parts += ["## Left out\n"]
        parts += [f"- {name}: {reason}" for name, reason in report.left_out.items()]
        parts.append("")
    if report.fits:
        parts += ["## What fitting found\n", *(f"- {k}: {v}" for k, v in report.fits.items()), ""]
    if report.notes:
        parts += ["## Measured in\n", *(f"- {k}: {v}" for k, v in report.notes.items()), ""]
    return "\n".join(parts)


def terminal(report: Report, most: int = 14) -> list[RenderableType]:
    """Return what is printed: tables if they are short, and what they say.

    Of several sizes of the sketch it is the first, of queries by their kind all together.

    Args:
        report: what was measured.
        most: rows of a table that is still printed; longer ones are in the files.
    """
    found: list[RenderableType] = []
    report = report.at_one_size()
    for task in tasks(report.results):
        rows = [r for r in report.results if r.task == task and _shown(r) and not _apart(r)]
        if len(names(rows)) <= most:
            found.append(_terminal_table(task, rows))
    text = Text(summary(report), style="bold")
    wish = ""
    for c in conclusions(report):
        if c.wish != wish:
            text.append(f"\n\n{c.wish}", style="bold")
            wish = c.wish
        text.append(f"\n  {c.where}: ", style="dim not bold").append(c.text, style="not bold")
    found.append(Panel(text, title="Which method for what", title_align="left", padding=(1, 2)))
    if report.fits and len(report.fits) <= most:
        lines = "\n".join(f"{name}: {note}" for name, note in report.fits.items())
        found.append(Text(lines, style="dim"))
    for name, reason in report.left_out.items():
        found.append(Text(f"left out: {name}: {reason}", style="yellow"))
    return found


def _terminal_table(task: str, rows: Sequence[Result]) -> Table:
    title = f"{task} ({max(r.queries for r in rows)} queries)"
    table = Table(title=title, title_justify="left")
    table.add_column("method", overflow="fold")
    columns = metrics(rows)
    for metric in columns:
        table.add_column(metric, justify="right", overflow="fold")
    for name in names(rows):
        table.add_row(name, *[_terminal_cell(find(rows, name, metric)) for metric in columns])
    return table


def tasks(results: Sequence[Result]) -> list[str]:
    """Return the tasks, in order."""
    return list(dict.fromkeys(r.task for r in results))


def metrics(rows: Sequence[Result]) -> list[str]:
    """Return the metrics of a task, in order; two ground truths' metrics of one name apart."""
    return list(dict.fromkeys(label(r, rows) for r in rows))


def label(result: Result, rows: Sequence[Result]) -> str:
    """Return a metric's column head."""
    several = len({r.truth for r in rows if r.metric == result.metric}) > 1
    return f"{result.truth}: {result.metric}" if several else result.metric


def line(result: Result) -> str:
    """Return what the tables call a row: its name, and the sketch's size where there are several.

    What looks at no gradient is the same at every size.
    """
    has_size = result.dim is not None and result.reads == "gradients"
    return f"{result.name}, k = {result.dim:,}" if has_size else result.name


def names(rows: Sequence[Result]) -> list[str]:
    """Return the rows' names: references first, then methods in order."""
    ordered = sorted(rows, key=lambda r: r.control != "reference")
    return list(dict.fromkeys(line(r) for r in ordered))


def find(rows: Sequence[Result], name: str, metric: str) -> Result | None:
    """Return one cell of a task."""
    return next((r for r in rows if line(r) == name and label(r, rows) == metric), None)


def cell(result: Result | None) -> str:
    """Return a cell in Markdown."""
    if result is None:
        return ""
    half = (result.high - result.low) / 2
    text = number(result.mean, result.metric).removesuffix(" %")
    if half > 0:
        text += f" ±{number(half, result.metric).removesuffix(' %').lstrip('+')}"
    if result.better or result.worse:
        text += "\\*"
    return f"**{text}**" if result.best and result.better else text


def _shown(result: Result) -> bool:
    return result.control in ("", "reference")


def _apart(result: Result) -> bool:
    """Say whether only queries of one kind were measured, as for the tables of the DMin paper."""
    return ", " in result.metric


def _markdown_table(task: str, rows: Sequence[Result]) -> list[str]:
    rows = [r for r in rows if _shown(r)]
    title = f"### {task} ({max(r.queries for r in rows)} queries)\n"
    columns = metrics(rows)
    kinds = list(dict.fromkeys(column.partition(", ")[0] for column in columns))
    if len(kinds) == len(columns):
        return [title, *_grid(rows, {column: column for column in columns}), ""]
    # Queries of each value apart, as in the tables of the DMin paper: one for each metric.
    lines = [title]
    for kind in kinds:
        apart = [column for column in columns if column.partition(", ")[0] == kind]
        heads = {column: column.partition(", ")[2] or "all" for column in apart}
        lines += [f"{kind}:\n", *_grid(rows, heads, cost=True), ""]
    return lines


def _grid(rows: Sequence[Result], heads: Mapping[str, str], cost: bool = False) -> list[str]:
    """Return a table, a column a metric with the head given; bytes and seconds if asked for."""
    takes = ["KiB an example", "ms a query"] if cost else []
    titles = ["method", *takes, *heads.values()]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in names(rows):
        found = [find(rows, name, column) for column in heads]
        one = next((r for r in found if r is not None), None)
        if one is None:
            continue
        spent = [f"{one.bytes / 1024:.1f}", f"{1000 * one.query_seconds:.2f}"] if cost else []
        lines.append(f"| {' | '.join([name, *spent, *(cell(r) for r in found)])} |")
    return lines


def _controls(results: Sequence[Result]) -> list[str]:
    """Return, for each metric that a control changes, the control beside the method itself."""
    lines = []
    for task, truth, metric in dict.fromkeys((r.task, r.truth, r.metric) for r in results):
        rows = [r for r in results if (r.task, r.truth, r.metric) == (task, truth, metric)]
        controls = [c for c in ("untrained", *TRANSFORMED) if any(r.control == c for r in rows)]
        main = metric in ("LDS", "leave-out ρ", "mAP", "recall@1", "AUROC", "precision@10")
        if not controls or not main:
            continue
        lines.append(f"### {task}, {metric}\n")
        lines.append(f"| method | as it is | {' | '.join(controls)} |")
        lines.append(f"|---|---|{'---|' * len(controls)}")
        for r in rows:
            if r.control:
                continue
            kin = {o.control: o for o in rows if (o.method, o.tuned) == (r.method, r.tuned)}
            cells = [cell(kin.get(c)).replace("**", "").replace("\\*", "") for c in controls]
            value = cell(r).replace("**", "").replace("\\*", "")
            lines.append(f"| {r.name} | {value} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _costs(results: Sequence[Result]) -> list[str]:
    lines = ["| method | chosen | KiB an example | fit, s | a query, ms |", "|---|---|---|---|---|"]
    seen = set()
    for r in results:
        if r.control or line(r) in seen:
            continue
        seen.add(line(r))
        lines.append(
            f"| {line(r)} | {r.settings} | {r.bytes / 1024:.1f} | {r.fit_seconds:.2f} | "
            f"{1000 * r.query_seconds:.2f} |"
        )
    return [*lines, ""]


def _terminal_cell(result: Result | None) -> str:
    text = cell(result).replace("\\*", "*")
    return f"[bold green]{text.strip('*')}[/]" if text.startswith("**") else text
