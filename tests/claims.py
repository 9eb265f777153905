"""Tables of pages, made of the committed results: ``PYTHONPATH=tests:. python -m claims``.

A page has, above a table in Markdown whose head and first column are written by hand,

    <!-- table: experiments/coverage/intervals.csv -->

for every line of a CSV (or all of a table in Markdown), or for the cells of a benchmark, a
task/truth/metric each column,

    <!-- measured: experiments/lds/quick/results.csv
    generated/subsets/LDS; heldout/subsets/LDS -->

and below it ``<!-- end -->``.
"""

import json
import re
from functools import cache
from importlib import import_module
from pathlib import Path

from dmin.evaluation.report.results import Report, Result
from dmin.evaluation.report.tables import cell
from dmin.runtime.escape import read_csv

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/README.md")]
MARKED = re.compile(r"<!-- (table|measured): (\S+)([^>]*?) ?-->\n(.*?)<!-- end -->", re.DOTALL)
NUMBER, WHOLE = r"[+−]?\d*\.\d+", r"[+−]?(?:\d{1,3}(?:,\d{3})+|\d+)"
UNIT = r" (?:ms|GB|million|years|×(?! ?\d))(?!\w)"
FIGURE = re.compile(rf"(?<![\w.=/:-])(?:{NUMBER}|{WHOLE}{UNIT})(?!\w|\.\d)")
# Code, links, what heads a page, and what another test makes anew are no claims.
BLOCKS = re.compile(
    r"```.*?```|\A---.*?^---|^ {4,}.*?$|<!-- table -->.*?<!-- /table -->", re.S | re.M
)
ASIDE = re.compile(r"`[^`]*`|\]\([^)]*\)|arXiv[: ]?[\d., ]+|<!--|-->")


def remade(page):
    """Return a page with its marked tables made anew."""

    def table(found):
        kind, source, columns, old = found.groups()
        if source.endswith(".md"):
            return found[0].replace(old, (ROOT / source).read_text())
        head, *lines = old.strip().splitlines()
        rule, rows = lines[0], lines[1:]
        if kind == "table":
            rows = [
                f"| {' | '.join(map(shown, line.values()))} |" for line in read_csv(ROOT / source)
            ]
        else:
            places = [tuple(each.strip().split("/")) for each in columns.split(";")]
            rows = [measured(ROOT / source, row, places) for row in rows]
        made = "\n".join([head, rule, *rows])
        return found[0].replace(old, f"{made}\n")

    return MARKED.sub(table, page.read_text())


def shown(text):
    """Write a number of a CSV as pages do: without the zero before its point."""
    return re.sub(r"^(-?)0\.", r"\1.", text).replace("-", "−") if re.match(r"-?\d", text) else text


@cache
def results(path):
    """Return the lines of a benchmark's table, by place and name."""
    if path.suffix == ".parquet":
        found = import_module("pyarrow.parquet").read_table(path).to_pylist()
        lines = [Result(**line) for line in found]
    else:
        lines = Report.load(path.parent).results
    return {(line.place, line.name): line for line in lines}


def measured(path, row, places):
    """Return a row with each cell as the benchmark's own tables have it; an empty one stays so."""
    title, *cells = (each.strip() for each in row.strip().strip("|").split("|"))
    name = title.strip("*").removesuffix(" network").replace("**", "")
    found = [results(path).get((place, name)) for place in places]
    if all(each is None for each in found):
        raise AssertionError(f"{path}: there is no row {name!r}")
    made = [
        old if len(place) == 1 or not old else cell(each)
        for place, each, old in zip(places, found, cells, strict=True)
    ]
    return f"| {' | '.join([title, *made])} |"


@cache
def loaded(table):
    """Return a table: of a benchmark by place and name, of a CSV as lines, of JSON as it is."""
    path = EXPERIMENTS / table
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".parquet" or path.open().read(17) == "task,truth,metric":
        return {" ".join((*place, name)): vars(x) for (place, name), x in results(path).items()}
    return read_csv(path)


def number_at(table, cell):
    """Return a number of a table: by its keys, one over another (a pair), or the number itself."""
    if isinstance(cell, tuple):
        return number_at(table, cell[0]) / number_at(table, cell[1])
    if not isinstance(cell, str):
        return cell
    found = loaded(table)
    for key in cell.split("/"):
        if isinstance(found, list):
            lines = ((f"{' '.join(map(str, line.values()))} ", line) for line in found)
            (found,) = (line for text, line in lines if text.startswith(f"{key} "))
        else:
            found = found[key]
    return float(found)


def plain(page):
    """Return the words of a page in one line, without code and tables that are made."""
    return re.sub(r"\s+", " ", BLOCKS.sub(" ", MARKED.sub(" ", (ROOT / page).read_text())))


def told(says):
    """Return the pattern of what a claim says, a group for each figure."""
    return re.compile(re.escape(says).replace(r"\{\}", rf"({NUMBER}|{WHOLE})"))


def plainly(text):
    """Return the number that a figure is."""
    return float(text.replace("−", "-").replace(",", ""))


def figures(text):
    """Return where figures stand: numbers with a point, and whole ones of some units."""
    shown = ASIDE.sub(lambda aside: " " * len(aside[0]), text)
    return [match.span() for match in FIGURE.finditer(shown)]


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(remade(page))
