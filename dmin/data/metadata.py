"""Captions, labels and all else that stands in metadata files beside images."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dmin.data.base import Facts as Facts
from dmin.runtime.errors import DminError

Column = str | Sequence[str | None] | None
NAMES = ("metadata.jsonl", "metadata.csv")


def read_rows(root: Path, tables: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the rows of metadata files by the path of their image below the root.

    Args:
        root: the folder of images.
        tables: paths of the metadata files below it; each names images relative to itself.

    Raises:
        DminError: a file is not as it should be, or an image is named twice.
    """
    by_name: dict[str, dict[str, Any]] = {}
    for table in tables:
        path = root / table
        rows = list(_jsonl(path) if path.suffix == ".jsonl" else _csv(path))
        for number, row in rows:
            name = (PurePosixPath(table).parent / _file_name(path, number, row)).as_posix()
            if name in by_name:
                raise DminError(
                    f"{path}, line {number}: {name} is named twice. Keep one of the rows."
                )
            by_name[name] = row
    return by_name


def read_facts(
    rows: dict[str, dict[str, Any]], where: str, label: Column, text: Column
) -> dict[str, Facts]:
    """Split each row into label, caption and the rest.

    Args:
        rows: by image.
        where: what to call the metadata in a message.
        label: column of the label, or several, of which the first that is there; None for none.
        text: column of the caption, likewise.

    Raises:
        DminError: a column is not there but was asked for, or seems misspelt; or a value is no
            label or caption.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    label, text = _column("label", label, columns, where), _column("text", text, columns, where)
    return {name: split_row(row, label, text, name) for name, row in rows.items()}


def as_label(value: Any, name: str) -> int | str | None:
    """Return a label as an integer or text.

    Raises:
        DminError: it is neither.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise DminError(f"{name} has the label {value!r}; a label is an integer or text.")


def as_caption(value: Any, name: str) -> str | None:
    """Return a caption as text.

    Raises:
        DminError: it is neither text nor a number.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # the caption "7" looks like a number in a table
    raise DminError(f"{name} has the caption {value!r}; a caption is text.")


def split_row(row: Mapping[str, Any], label: str | None, text: str | None, name: str) -> Facts:
    """Return the label and the caption of a row, and the rest of it.

    Args:
        row: what is said of an image.
        label: column of the label; None for none.
        text: column of the caption, which may be the same; None for none.
        name: what to call the image in a message.
    """
    found = as_label(row.get(label), name) if label else None
    caption = as_caption(row.get(text), name) if text else None
    return Facts(found, caption, {k: v for k, v in row.items() if k not in (label, text)})


def _column(setting: str, asked: Column, columns: list[str], where: str) -> str | None:
    """Return the column that is asked for, and there.

    That none is there is refused, unless the default is among them and nothing looks like it.
    """
    names = [asked] if isinstance(asked, str) else [name for name in asked or () if name]
    found = next((name for name in names if name in columns), None)
    if found is not None or not names:
        return found
    lower = {name.lower(): name for name in columns}
    near = [n for name in names for n in difflib.get_close_matches(name.lower(), lower, 1, 0.8)]
    if near or setting not in names:
        guess = f" Did you mean {lower[near[0]]}?" if near else ""
        raise DminError(
            f"{where} has no column {names[0]!r}.{guess} Columns there: {', '.join(columns)}. "
            f"Set data.{setting}=<column>, or data.{setting}=null to do without."
        )
    return names[0]


def _file_name(path: Path, number: int, row: dict[str, Any]) -> PurePosixPath:
    name = row.pop("file_name", None)
    if not isinstance(name, str) or not name:
        raise DminError(
            f"{path}, line {number}: no file_name. Every row must name its image in that column; "
            f"columns there: {', '.join(map(str, row)) or 'none'}."
        )
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts:
        raise DminError(
            f"{path}, line {number}: file_name {name} leads out of the folder. Name images "
            f"relative to the metadata file, so that their ids are the same on every machine."
        )
    return inside


def _jsonl(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DminError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise DminError(f"{path}, line {number} is not a JSON object.")
        yield number, row


def _csv(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    rows: list[tuple[int, dict[str, Any]]] = []
    for row in reader:
        if None in row:
            raise DminError(
                f"{path}, line {reader.line_num} has more cells than the header. Put quotes around "
                f"values with commas."
            )
        rows.append((reader.line_num, {k: v if v != "" else None for k, v in row.items()}))
    for column in reader.fieldnames or ():
        values = [row[column] for _, row in rows if row[column] is not None]
        # A column of integers is one in every row and written as Python writes them: 007 is text.
        if column != "file_name" and all(_is_integer(value) for value in values):
            for _, row in rows:
                row[column] = None if row[column] is None else int(row[column])
    return rows


def _is_integer(value: str) -> bool:
    digits = value.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 19 and str(int(value)) == value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Excel writes a byte order mark
    except UnicodeDecodeError as error:
        raise DminError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error
