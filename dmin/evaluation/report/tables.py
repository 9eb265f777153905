"""Results as Markdown and in a terminal: a table for each task, with methods as rows."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.markdown import Markdown

from dmin.evaluation.report.conclusions import conclusions, number, summary
from dmin.evaluation.report.results import TRANSFORMED, Report, Result
from dmin.runtime.formatting import markdown_table

LEGEND = (
    "With half the width of the 95 % interval. **Bold**: no other method is better beyond chance, "
    "and it is itself better than {reference} beyond chance (paired differences in the same "
    "resamples). \\*: differs from {reference} beyond chance."
)


def markdown(report: Report) -> str:
    """Return the whole report as Markdown."""
    parts = [*_said(report), "", "## Tables\n", LEGEND.format(reference=report.reference), ""]
    for task in tasks(report.results):
        parts += _task_table(task, [r for r in report.results if r.task == task])
    if any(r.control in (*TRANSFORMED, "untrained") for r in report.results):
        parts += ["## Controls\n", *_controls(report.results)]
    parts += ["## What each takes\n", *_costs(report.results)]
    for title, told in _asides(report).items():
        parts += [f"## {title}\n", *(f"- {k}: {v}" for k, v in told.items()), ""] if told else []
    return "\n".join(parts)


def terminal(report: Report, most: int = 14) -> Markdown:
    """Return the printed report: conclusions, and tables and lists if they are short.

    It has only the first of several sketch sizes, and no separate values of queries of one kind.

    Args:
        report: the results.
        most: most rows of a printed table; longer ones are only in the files.
    """
    parts: list[str] = []
    report = report.at_one_size()
    for task in tasks(report.results):
        rows = [r for r in report.results if r.task == task and _shown(r) and not _apart(r)]
        parts += _task_table(task, rows) if len(names(rows)) <= most else []
    parts += _said(report)
    for title, told in _asides(report).items():
        if told and (len(told) <= most or title == "Left out"):
            parts += [f"\n{title}:\n", *(f"- {k}: {v}" for k, v in told.items())]
    return Markdown("\n".join(parts))


def _said(report: Report) -> list[str]:
    """Return the conclusions from the tables."""
    parts = ["## Which method for what\n", summary(report), ""]
    for wish, found in groupby(conclusions(report), lambda c: c.wish):
        parts += [f"- **{wish}.**", *(f"  - {c.where}: {c.text}" for c in found)]
    return parts


def _asides(report: Report) -> dict[str, dict[str, str]]:
    return {
        "Left out": report.left_out,
        "What fitting found": report.fits,
        "Measured in": report.notes,
    }


def _title(task: str, rows: Sequence[Result]) -> str:
    return f"{task} ({max(r.queries for r in rows)} queries)"


def tasks(results: Sequence[Result]) -> list[str]:
    """Return the tasks, in order."""
    return list(dict.fromkeys(r.task for r in results))


def metrics(rows: Sequence[Result]) -> list[str]:
    """Return the metrics of a task, in order, with the ground truth where names are ambiguous."""
    return list(dict.fromkeys(label(r, rows) for r in rows))


def label(result: Result, rows: Sequence[Result]) -> str:
    """Return a metric's column header."""
    several = len({r.truth for r in rows if r.metric == result.metric}) > 1
    return f"{result.truth}: {result.metric}" if several else result.metric


def line(result: Result) -> str:
    """Return a row's name in the tables, with the sketch size if there are several.

    Methods without gradients are the same at every size.
    """
    has_size = result.dim is not None and result.reads == "gradients"
    return f"{result.name}, k = {result.dim:,}" if has_size else result.name


def names(rows: Sequence[Result]) -> list[str]:
    """Return the rows' names: references first, then methods in order."""
    ordered = sorted(rows, key=lambda r: r.control != "reference")
    return list(dict.fromkeys(line(r) for r in ordered))


def find(rows: Sequence[Result], name: str, metric: str) -> Result | None:
    """Return the result of a row and metric, or None."""
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
    """Return whether only queries of one value were measured, as in the DMin paper's tables."""
    return ", " in result.metric


def _task_table(task: str, rows: Sequence[Result]) -> list[str]:
    rows = [r for r in rows if _shown(r)]
    title, columns = f"### {_title(task, rows)}\n", metrics(rows)
    kinds = list(dict.fromkeys(column.partition(", ")[0] for column in columns))
    if len(kinds) == len(columns):
        return [title, *_grid(rows, {column: column for column in columns})]
    # Queries of each value separately, as in the DMin paper's tables: one table per metric.
    lines = [title]
    for kind in kinds:
        apart = [column for column in columns if column.partition(", ")[0] == kind]
        heads = {column: column.partition(", ")[2] or "all" for column in apart}
        lines += [f"{kind}:\n", *_grid(rows, heads, cost=True)]
    return lines


def _grid(rows: Sequence[Result], heads: Mapping[str, str], cost: bool = False) -> list[str]:
    """Return a table, one column per metric with the given header; optionally with costs."""
    takes = ["KiB an example", "ms a query"] if cost else []
    lines = []
    for name in names(rows):
        found = [find(rows, name, column) for column in heads]
        one = next((r for r in found if r is not None), None)
        if one is not None:
            kib, _, ms = _spent(one)
            lines.append([name, *([kib, ms] if cost else []), *map(cell, found)])
    return markdown_table(["method", *takes, *heads.values()], lines)


def _spent(result: Result) -> tuple[str, str, str]:
    """Return KiB per example, seconds to fit and milliseconds per query."""
    kib, ms = result.bytes / 1024, 1000 * result.query_seconds
    return f"{kib:.1f}", f"{result.fit_seconds:.2f}", f"{ms:.2f}"


def _controls(results: Sequence[Result]) -> list[str]:
    """Return a table for each metric that a control changes, of methods and their controls."""
    lines = []
    for place in dict.fromkeys(r.place for r in results):
        task, _, metric = place
        rows = [r for r in results if r.place == place]
        controls = [c for c in ("untrained", *TRANSFORMED) if any(r.control == c for r in rows)]
        main = metric in ("LDS", "leave-out ρ", "mAP", "recall@1", "AUROC", "precision@10")
        if not controls or not main:
            continue
        plain = []
        for r in (r for r in rows if not r.control):
            kin = {o.control: o for o in rows if (o.method, o.tuned) == (r.method, r.tuned)}
            cells = [cell(o) for o in (r, *map(kin.get, controls))]
            plain.append([r.name, *(c.replace("**", "").replace("\\*", "") for c in cells)])
        lines += [
            f"### {task}, {metric}\n",
            *markdown_table(["method", "as it is", *controls], plain),
        ]
    return lines


def _costs(results: Sequence[Result]) -> list[str]:
    head = ["method", "chosen", "KiB an example", "fit, s", "a query, ms"]
    rows: dict[str, Result] = {}
    for r in (r for r in results if not r.control):
        rows.setdefault(line(r), r)
    return markdown_table(head, ([name, r.settings, *_spent(r)] for name, r in rows.items()))
