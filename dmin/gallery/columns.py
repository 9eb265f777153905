"""Metadata columns about the source of an example: rights, contact, links, original file."""

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

RIGHTS = re.compile(
    "licen[cs]e|licensor|copyright|rights|artist|author|creator|photographer|owner|credits?|"
    "attribution|contact|e?mail|ur[il]|link|homepage|website|source"
)
"""Words in the names of columns that name the owner of a picture, or a contact."""
FILES = ("path", "file", "file_path", "image_path", "filename", "file_name")


def text(value: Any) -> str:
    """Return a value of the metadata as displayed text."""
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def is_rights(column: str) -> bool:
    """Return whether a column is about rights: `source_url`, `artistName`, `licence`."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", column)
    return any(RIGHTS.fullmatch(word.lower()) for word in words)


def address(value: str) -> str | None:
    """Return the link of a value that is a web or mail address, else None."""
    if re.fullmatch(r"https?://[^\s<>\"']+", value, re.IGNORECASE):
        return value
    if re.fullmatch(r"[\w.+-]+@[\w-]+(\.[\w-]+)+", value):
        return f"mailto:{value}"
    return None


def original(known: str | Path | None, metadata: dict[str, Any], page: Path) -> str | None:
    """Return the link from a page to an example's original file.

    Args:
        known: the file, if the dataset has one for each example.
        metadata: of the example; if ``known`` is None, an absolute path in it is used.
        page: the page's own file.

    Returns:
        A relative link to a file below the page's folder, so that both may be moved together; else
        ``file://…``; None if no file is known.
    """
    named = (metadata.get(name) for name in FILES)
    paths = [p for p in (known, *named) if isinstance(p, Path) or (p and isinstance(p, str))]
    if known is None:
        paths = [p for p in paths if os.path.isabs(p)]
    if not paths or "\0" in str(paths[0]):
        return None
    file, folder = Path(os.path.abspath(paths[0])), Path(os.path.abspath(page)).parent
    if file.is_relative_to(folder):
        return quote(file.relative_to(folder).as_posix())
    return file.as_uri()
