"""Escape text from data, paths and settings for terminals and spreadsheets."""

import csv
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

# Control characters but line feed and tab, which a terminal obeys; those that turn the direction
# of text; halves of characters, which cannot be written at all.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_FORMULA, _QUOTED = re.compile(r"\s*[-=+@]|\t"), re.compile(r"'(\s*[-=+@]|\t)")
_NUMBER = re.compile(r"[-+]?(\d[\d.,]*(e[-+]?\d+)?|inf|nan)", re.IGNORECASE)


def printable(text: str) -> str:
    r"""Return a text with what a terminal would obey spelled out: ``\u001b``, ``\u202e``."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def named_apart(names: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """Return names of their own for columns: ``metadata_`` before those that would hide others.

    Args:
        names: of the columns.
        taken: names that others have.
    """
    names = list(names)
    found: dict[str, str] = {}
    for name in names:
        own = name
        while own in taken or (own != name and (own in names or own in found.values())):
            own = f"metadata_{own}"
        found[name] = own
    return found


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


def end_lines_in_lf(file: Path) -> None:
    r"""Have a table that another library wrote end its lines in ``\n``, as all of dmin's do."""
    if b"\r\n" in (content := file.read_bytes()):
        file.write_bytes(content.replace(b"\r\n", b"\n"))


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table that `write_csv` wrote, as they were."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: text[1:] if _QUOTED.match(text) else text for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text
