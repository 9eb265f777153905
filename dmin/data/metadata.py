"""Metadata files next to images: captions, labels and further columns."""

import csv
import difflib
import importlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from dmin.data.base import Facts as Facts
from dmin.data.texts import odd, parse_json, read_text, repeated
from dmin.runtime.errors import DminError

Column = str | Sequence[str | None] | None
NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
Refuse = Callable[[str, DminError], None]
"""Receives the name of an image and the error in its metadata, which it raises or records."""


def stop(name: str, error: DminError) -> NoReturn:
    """Raise the error in the metadata of an image."""
    raise error


def read_rows(
    root: Path, tables: Sequence[str], refuse: Refuse = stop
) -> dict[str, dict[str, Any]]:
    """Return the rows of metadata files by the path of their image below the root.

    Args:
        root: the folder of images.
        tables: paths of the metadata files below it; each names images relative to itself.
        refuse: receives rows that cannot be used.

    Raises:
        DminError: a file is invalid, or a folder has two metadata files.
    """
    by_name: dict[str, dict[str, Any]] = {}
    folders: dict[str, str] = {}
    for table in tables:
        path = root / table
        other = folders.setdefault(str(path.parent), path.name)
        if other != path.name:
            raise DminError(f"{path} and a {other} are both in the folder. Keep one of the two.")
        for number, row in _READ[path.suffix](path):
            try:
                row = row if isinstance(row, dict) else parse_json(row, f"{path}, line {number}")
                if None in row:
                    raise DminError(
                        f"{path}, line {number} has more cells than the header. Put quotes around "
                        f"values with commas."
                    )
                inside = _file_name(path, number, row)
                name = (PurePosixPath(table).parent / inside).as_posix()
                if name in by_name:
                    raise DminError(
                        f"{path}, line {number}: {name} is listed twice. Keep one of the rows."
                    )
            except DminError as error:
                refuse(f"{table}, line {number}", error)
                continue
            by_name[name] = row
    return by_name


def read_table(path: Path, key: str, columns: Sequence[str] = ()) -> dict[str, Any]:
    """Return the rows of a table by the values of one column.

    Args:
        path: a ``.jsonl``, ``.csv`` or ``.parquet`` file.
        key: the column that names each row's image.
        columns: return the first of these that is not empty; without any, the whole row.

    Raises:
        DminError: the file has another suffix, or a row names no image or one named before.
    """
    if path.suffix not in _READ:
        raise DminError(f"{path} is not a supported table: {', '.join(_READ)}.")
    found: dict[str, Any] = {}
    for number, row in _READ[path.suffix](path):
        where = f"{path}, line {number}"
        row = row if isinstance(row, dict) else parse_json(row, where)
        name = row.get(key)
        if name is None or str(name) in found:
            wrong = f"no {key}" if name is None else f"{name} is named twice"
            raise DminError(
                f"{where}: {wrong}. Each row must name its own image in this column; columns: "
                f"{', '.join(map(str, row))}."
            )
        said = [row[column] for column in columns if row.get(column)]
        found[str(name)] = (said or [None])[0] if columns else row
    return found


def read_facts(
    rows: dict[str, dict[str, Any]], where: str, label: Column, text: Column, refuse: Refuse = stop
) -> dict[str, Facts]:
    """Split each row into label, caption and other metadata.

    Args:
        rows: rows by image.
        where: name of the metadata in messages.
        label: column of the label, or several: the first that exists is used; None for none.
        text: the same for the caption.
        refuse: receives rows that cannot be used.

    Raises:
        DminError: a given column does not exist, or seems misspelt.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    label, text = _column("label", label, columns, where), _column("text", text, columns, where)
    facts = {}
    for name, row in rows.items():
        try:
            facts[name] = split_row(row, label, text, name)
        except DminError as error:
            refuse(name, error)
    return facts


def split_row(row: Mapping[str, Any], label: str | None, text: str | None, name: str) -> Facts:
    """Return label, caption and other metadata of a row.

    Args:
        row: the row of an image.
        label: column of the label; None for none.
        text: column of the caption, which may be the same; None for none.
        name: name of the image in messages.

    Raises:
        DminError: label or caption has an invalid type, or a store cannot keep a value.
    """
    if reason := odd(row):
        raise DminError(f"the metadata of {name}: {reason}.")
    known, caption = row.get(label) if label else None, row.get(text) if text else None
    if isinstance(known, float) and known.is_integer() and abs(known) < 2**63:
        known = int(known)
    if not isinstance(known, int | str | None):
        raise DminError(f"{name} has the label {known!r}; labels must be integers or text.")
    if isinstance(caption, int | float) and not isinstance(caption, bool):
        caption = str(caption)  # the caption "7" looks like a number in a table
    if not isinstance(caption, str | None):
        raise DminError(f"{name} has the caption {caption!r}; captions must be text.")
    known = int(known) if isinstance(known, bool) else known
    return Facts(known, caption, {k: v for k, v in row.items() if k not in (label, text)})


def _column(setting: str, asked: Column, columns: list[str], where: str) -> str | None:
    """Return the first given column that exists.

    It is an error if none exists, unless the default is among them and no similar name exists.
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
            f"Set data.{setting}=<column>, or data.{setting}=null for none."
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
            f"{path}, line {number}: file_name {name} points outside of the folder. Name images "
            "relative to the metadata file, so that their ids are the same on every machine."
        )
    return inside


def _jsonl(path: Path) -> Iterable[tuple[int, str]]:
    lines = enumerate(read_text(path).split("\n"), 1)
    return ((number, line) for number, line in lines if line.strip())


def _parquet(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise DminError(f"{path} needs the package pyarrow: pip install 'dmin[data]'.") from error
    try:
        _require_once(path, parquet.read_schema(path).names)
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DminError(f"{path} cannot be read as parquet ({error}). Write it again.") from error
    return enumerate(rows, 1)


def _csv(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    rows: list[tuple[int, dict[str, Any]]] = []
    limit = csv.field_size_limit(2**31 - 1)  # values that are too long are refused by image
    try:
        _require_once(path, reader.fieldnames or ())
        for row in reader:
            rows.append((reader.line_num, {k: v if v != "" else None for k, v in row.items()}))
    except csv.Error as error:
        raise DminError(f"{path}, line {reader.line_num}: {error}. Fix this line.") from error
    finally:
        csv.field_size_limit(limit)
    for column in reader.fieldnames or ():
        values = [row[column] for _, row in rows if row[column] is not None]
        # Integers only if all values of the column are, in Python's spelling: 007 is text.
        if column != "file_name" and all(_is_integer(value) for value in values):
            for _, row in rows:
                row[column] = None if row[column] is None else int(row[column])
    return rows


def _require_once(path: Path, columns: Sequence[str]) -> None:
    """Refuse a table in which two columns have the same name."""
    if (name := repeated(columns)) is not None:
        raise DminError(f"{path} has two columns {name!r}. Rename one of them.")


def _is_integer(value: str) -> bool:
    digits = value.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 19 and str(int(value)) == value


_READ: dict[str, Callable[[Path], Iterable[tuple[int, Any]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
