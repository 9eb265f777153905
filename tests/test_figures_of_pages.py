"""Every figure of a page stands in a table that the page links, or is said to be no measurement."""

import bisect
import re
from functools import cache

from claims import PAGES, ROOT

FIGURE = re.compile(r"(?<![\w.=/:,-])[−+-]?(?:\d{1,3}(?:,\d{3})+|\d*)\.\d+(?![\w.]|\.\d)")
NUMBER = re.compile(r"(?<![\w.])-?\d*\.?\d+(?:e[-+]?\d+)?(?![\w.])")
# Units in which pages write what a table has plainly: its number is the figure times one of these.
UNITS = (1, 0.01, 1e-3, 60, 1e3, 1e6, 1e9, 2**10, 2**20, 2**30)
# Code, links and what heads a page are no claims.
ASIDE = re.compile(
    r"```.*?```|\A---.*?^---|`[^`]*`|\]\([^)]*\)|arXiv[: ]?[\d., ]+|<!--|-->", re.S | re.M
)
# Sections whose figures are counted, computed or assumed, as they say, or versions and names.
UNMEASURED = {
    "docs/performance.md": ("Operations", "On a GPU"),
    "docs/scale.md": ("Beyond the machines at hand",),  # written by experiments/scale/run.py
    "docs/models.md": ("",),
    "docs/commands.md": ("",),
    "docs/sweeps.md": ("",),
    "docs/slurm.md": ("",),  # what a command printed, as an example
}


@cache
def numbers(folder):
    """Return every number in the tables of an experiment."""
    found = set()
    for file in sorted((ROOT / "experiments" / folder).rglob("*")):
        if file.suffix in (".csv", ".json") and file.name != "record.json":
            found |= {float(each[0]) for each in NUMBER.finditer(file.read_text())}
        elif file.suffix == ".parquet":
            import pyarrow.parquet as parquet

            columns = parquet.read_table(file).columns
            found.update(x for c in columns if str(c.type) == "double" for x in c.to_pylist())
    return {x for x in found if x is not None and x == x}


def stands_in(text, values):
    """Say whether a figure is one of these, rounded: as it is, as a share or a percentage."""
    figure, half = float(text), 0.5000001 * 10.0 ** -len(text.partition(".")[2])
    forms = [(unit * figure, unit * half) for unit in UNITS]
    forms += [(1 - figure, half)]  # what is left
    forms += [(1 - figure / 100, half / 100), (1 + figure / 100, half / 100)]  # a difference, in %
    for value, near in forms:
        for signed in (value, -value):
            at = bisect.bisect_left(values, signed - near)
            if at < len(values) and values[at] <= signed + near:
                return True
    return False


def sections(page):
    """Yield the title and text of each section of a page."""
    title = ""
    for part in re.split(r"^(?=#+ )", ASIDE.sub(" ", page.read_text()), flags=re.M):
        title = part.partition("\n")[0].lstrip("# ") if part.startswith("#") else title
        yield title, part


def is_a_ratio(text, line):
    """Say whether a figure is one over another of the numbers in its row of a table."""
    others = [float(x) for x in re.findall(r"\d*\.?\d+", line) if float(x)]
    near = 0.5000001 * 10.0 ** -len(text.partition(".")[2])
    return line.startswith("|") and any(
        abs(a / b - float(text)) <= near for a in others for b in others
    )


def test_a_figure_stands_in_a_table_that_its_page_links():
    lacking = []
    for page in PAGES:  # in one test, as they read the same tables
        name = page.relative_to(ROOT).as_posix()
        beside = r"\.\./(\w+)" if page.parent.parent.name == "experiments" else r"experiments/(\w+)"
        folders = {*re.findall(beside, page.read_text()), page.parent.name}
        values, spared = sorted(set().union(*map(numbers, folders))), UNMEASURED.get(name, ())
        for title, text in sections(page):
            if title in spared or "" in spared:
                continue
            for line in text.splitlines():
                for found in FIGURE.finditer(line):
                    figure = found[0].replace("−", "-").replace("+", "").replace(",", "")
                    if not stands_in(figure, values) and not is_a_ratio(figure.lstrip("-"), line):
                        lacking.append((name, figure, line.strip()[:80]))
    assert not lacking
