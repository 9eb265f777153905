"""Every figure of an experiment's page stands in its tables, or in those linked beside it.

This finds figures that no table has. A large table has nearly every number of two digits: that a
figure is the right cell is tested of README.md and docs/ (`test_claims`).
"""

import bisect
import re
from functools import cache

from claims import ASIDE, BLOCKS, EXPERIMENTS

FIGURE = re.compile(r"(?<![\w.=/:,-])[−+-]?(?:\d{1,3}(?:,\d{3})+|\d*)\.\d+(?![\w.]|\.\d)")
NUMBER = re.compile(r"(?<![\w.])-?\d*\.?\d+(?:e[-+]?\d+)?(?![\w.])")
# Units in which pages write what a table has plainly: its number is the figure times one of these.
UNITS = (1, 0.01, 1e-3, 60, 1e3, 1e6, 1e9, 2**10, 2**20, 2**30)


@cache
def numbers(folder):
    """Return every number in the tables of an experiment."""
    found = set()
    for file in sorted((EXPERIMENTS / folder).rglob("*")):
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


def is_a_ratio(text, line):
    """Say whether a figure is one over another of the numbers in its row of a table."""
    others = [float(x) for x in re.findall(r"\d*\.?\d+", line) if float(x)]
    near = 0.5000001 * 10.0 ** -len(text.partition(".")[2])
    return line.startswith("|") and any(
        abs(a / b - float(text)) <= near for a in others for b in others
    )


def test_a_figure_stands_in_a_table_that_is_linked_beside_it():
    lacking = []
    for page in EXPERIMENTS.glob("*/README.md"):  # in one test, as they read the same tables
        for part in re.split(r"^(?=#+ )", BLOCKS.sub(" ", page.read_text()), flags=re.M):
            values = numbers_of(frozenset({page.parent.name, *re.findall(r"\.\./(\w+)", part)}))
            for line in part.splitlines():
                for found in FIGURE.finditer(ASIDE.sub(" ", line)):
                    figure = found[0].replace("−", "-").replace("+", "").replace(",", "")
                    if not stands_in(figure, values) and not is_a_ratio(figure.lstrip("-"), line):
                        lacking.append((page.parent.name, figure, line.strip()[:80]))
    assert not lacking, "\n".join(map(str, lacking))
