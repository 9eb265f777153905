"""The report as one HTML file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmin.evaluation.report.conclusions import advice, conclusions, spell
from dmin.evaluation.report.plots import MAIN, colours, families, family
from dmin.evaluation.report.results import Report, Result
from dmin.runtime.page import write_page

NOT_SHOWN = ("squared", "top 5 %")  # similar to soft-max, which is shown; only in the tables
TITLE = "How far can the answer be trusted?"


def save_page(report: Report, path: str | Path, title: str = TITLE) -> Path:
    """Write a page that shows every measure of a report.

    Args:
        report: the results.
        path: the HTML file to write.
        title: headline.
    """
    by_family: dict[str, list[str]] = {}
    for method, own in families(report).items():
        by_family.setdefault(own, []).append(method)
    data = {
        "title": title,
        "colours": colours(report),
        "families": by_family,
        "summary": advice(report),
        "reference": report.reference,
        "notes": report.notes,
        "fits": report.fits,
        "leftOut": report.left_out,
        "conclusions": [
            {
                "wish": c.wish,
                "where": c.where,
                "text": c.text,
                "best": c.best.name,
                "method": c.best.method,
                "value": spell(c.best),
                "ofCeiling": _round(c.best.of_ceiling),
                "tied": c.tied,
                "key": "/".join(c.best.place),
            }
            for c in conclusions(report)
        ],
        "main": list(MAIN),
        "rows": _packed([_row(r) for r in report.results if r.control not in NOT_SHOWN]),
        "path": _packed([{k: _round(v) for k, v in row.items()} for row in report.path]),
    }
    return write_page(Path(__file__).with_name("report"), title, data, path)


def _row(r: Result) -> dict[str, Any]:
    same = ("task", "truth", "metric", "name", "method", "tuned", "control", "settings")
    figures = {
        "mean": r.mean,
        "low": r.low,
        "high": r.high,
        "difference": r.difference,
        "differenceLow": r.difference_low,
        "differenceHigh": r.difference_high,
        "best": r.best,
        "ofCeiling": r.of_ceiling,
        "kib": r.bytes / 1024,
        "fit": r.fit_seconds,
        "ms": 1000 * r.query_seconds,
    }
    return {
        "key": "/".join(r.place),
        "dim": r.dim if r.reads == "gradients" else None,  # others are the same at every size
        "family": family(r),
        "n": r.queries,
        **{name: getattr(r, name) for name in same},
        **{name: _round(value) for name, value in figures.items()},
    }


def _packed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows as lists with a common order of columns, and each text only once."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    texts = list(dict.fromkeys(v for row in rows for v in row.values() if isinstance(v, str)))
    place = {text: [number] for number, text in enumerate(texts)}
    lines = [
        [place[v] if isinstance(v := row.get(name), str) else v for name in columns] for row in rows
    ]
    return {"columns": columns, "texts": texts, "lines": lines}


def _round(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.3g}") if math.isfinite(value) else None
