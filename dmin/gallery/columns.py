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
"""Words of the names of columns that say whose a picture is, or whom to ask."""
FILES = ("path", "file", "file_path", "image_path", "filename", "file_name")


def text(value: Any) -> str:
    """Return a value of the metadata as it is shown."""
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def is_rights(column: str) -> bool:
    """Say whether a column tells whose a picture is: `source_url`, `artistName`, `licence`."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", column)
    return any(RIGHTS.fullmatch(word.lower()) for word in words)


def address(value: str) -> str | None:
    """Return where a value leads if all of it is a web or mail address, else None."""
    if re.fullmatch(r"https?://[^\s<>\"']+", value, re.IGNORECASE):
        return value
    if re.fullmatch(r"[\w.+-]+@[\w-]+(\.[\w-]+)+", value):
        return f"mailto:{value}"
    return None


def original(known: str | Path | None, metadata: dict[str, Any], page: Path) -> str | None:
    """Return the address of an example's own file, as a page links it.

    Args:
        known: the file, if the dataset has one for each example.
        metadata: of the example; else an absolute path in it is taken.
        page: the page's own file.

    Returns:
        Relative for a file below the page's folder, so that both may move; else ``file://…``.
        None if no file is known.
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
