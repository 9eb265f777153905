"""Text from data, paths and settings, made harmless where it is shown: terminals, spreadsheets."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Control characters but line feed and tab, which a terminal obeys; those that turn the direction
# of text; halves of characters, which cannot be written at all.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NUMBER = re.compile(r"[-+]?(\d[\d.,]*(e[-+]?\d+)?|inf|nan)", re.IGNORECASE)


def printable(text: str) -> str:
    r"""Return a text with what a terminal would obey spelled out: ``\x1b``, ``\u202e``."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    r"""Write a table as UTF-8 with ``\n`` at the ends of lines; its columns are those of all rows.

    A text that a spreadsheet would take for a formula gets a ``'`` before it.
    """
    rows = list(rows)
    columns = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow([_cell(name) for name in columns])
        lines.writerows([_cell(row.get(name, "")) for name in columns] for row in rows)


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    formula = text.lstrip().startswith(("=", "+", "-", "@")) or text.startswith("\t")
    return f"'{text}" if formula and not _NUMBER.fullmatch(text) else text
