"""The tables of docs/models.md, of the code: ``PYTHONPATH=tests python -m models.documented``."""

import re
from pathlib import Path

from dmin.cli.tools import models

PAGE = Path(__file__).parents[2] / "docs/models.md"


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page():
    """Return docs/models.md with the tables that `dmin models` has."""
    tables = {
        "families": markdown(models.FAMILIES, models.families()),
        "refused": markdown(models.REFUSED, models.refused()),
    }
    text = PAGE.read_text()
    for name, table in tables.items():
        marks = rf"(<!-- dmin models {name} -->\n).*?(<!-- end -->)"
        text = re.sub(marks, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
