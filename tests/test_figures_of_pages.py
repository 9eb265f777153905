"""Every figure of a page stands in a table linked beside it, or is said to be no measurement.

This finds figures that no table has. A large table has nearly every number of two digits: that a
figure is the right cell is tested in `test_claims`.
"""

import bisect
import re
from functools import cache

from claims import PAGES, ROOT

FIGURE = re.compile(r"(?<![\w.=/:,-])[−+-]?(?:\d{1,3}(?:,\d{3})+|\d*)\.\d+(?![\w.]|\.\d)")
NUMBER = re.compile(r"(?<![\w.])-?\d*\.?\d+(?:e[-+]?\d+)?(?![\w.])")
# Units in which pages write what a table has plainly: its number is the figure times one of these.
UNITS = (1, 0.01, 1e-3, 60, 1e3, 1e6, 1e9, 2**10, 2**20, 2**30)
# Code, links and what heads a page are no claims.
BLOCKS = re.compile(r"```.*?```|\A---.*?^---", re.S | re.M)
ASIDE = re.compile(r"`[^`]*`|\]\([^)]*\)|arXiv[: ]?[\d., ]+|<!--|-->")
# Sections whose figures are counted, computed or assumed, as they say, or versions and names.
UNMEASURED = {
    "README.md": ("dmin",),  # versions and disk; the picture's figures are claims in test_claims
    "docs/performance.md": ("Operations", "On a GPU"),
    "docs/scale.md": ("Beyond the machines we had",),  # written by experiments/scale/run.py
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


@cache
def numbers_of(folders):
    """Return the numbers in the tables of several experiments, in order."""
    return sorted(set().union(*map(numbers, folders)))


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
    for part in re.split(r"^(?=#+ )", BLOCKS.sub(" ", page.read_text()), flags=re.M):
        title = part.partition("\n")[0].lstrip("# ") if part.startswith("#") else title
        yield title, part


def is_a_ratio(text, line):
    """Say whether a figure is one over another of the numbers in its row of a table."""
    others = [float(x) for x in re.findall(r"\d*\.?\d+", line) if float(x)]
    near = 0.5000001 * 10.0 ** -len(text.partition(".")[2])
    return line.startswith("|") and any(
        abs(a / b - float(text)) <= near for a in others for b in others
    )


def test_a_figure_stands_in_a_table_that_is_linked_beside_it():
    lacking = []
    for page in PAGES:  # in one test, as they read the same tables
        name = page.relative_to(ROOT).as_posix()
        inside = page.parent.parent.name == "experiments"
        link = re.compile(r"\.\./(\w+)" if inside else r"experiments/(\w+)")
        own, spared = {page.parent.name} if inside else set(), UNMEASURED.get(name, ())
        for title, text in sections(page):
            if title in spared or "" in spared:
                continue
            whole = own | set(link.findall(text)) or set(link.findall(page.read_text()))
            for line in text.splitlines():
                # A row of a table is held to the tables that it links, if it links some.
                near = set(link.findall(line)) if line.startswith("|") else set()
                values = numbers_of(frozenset(own | near if near else whole))
                for found in FIGURE.finditer(ASIDE.sub(" ", line)):
                    figure = found[0].replace("−", "-").replace("+", "").replace(",", "")
                    if not stands_in(figure, values) and not is_a_ratio(figure.lstrip("-"), line):
                        lacking.append((name, figure, line.strip()[:80]))
    assert not lacking, "\n".join(map(str, lacking))
