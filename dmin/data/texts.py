"""Text and JSON files: decoded by their byte-order mark, limited to what a store can keep."""

import codecs
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dmin.data.survey import read_bytes
from dmin.runtime.errors import DminError

# UTF-32 first, since its mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_DEEPEST, _LONGEST = 64, 2**20


def read_text(path: Path) -> str:
    """Return the text of a file, decoded by its byte-order mark, or as UTF-8 without one.

    Raises:
        DminError: it cannot be read or decoded.
    """
    return decode_text(read_bytes(path, str(path)), str(path))


def decode_text(content: bytes, where: str) -> str:
    """Return bytes as text, decoded by their byte-order mark, or as UTF-8 without one.

    Args:
        content: the bytes.
        where: name of the file in messages.

    Raises:
        DminError: they cannot be decoded.
    """
    codec = next((codec for mark, codec in _MARKS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        return content.decode(codec)
    except UnicodeDecodeError as error:
        name = codec.upper().removesuffix("-SIG")
        raise DminError(f"{where} is not {name} ({error}). Save it as UTF-8.") from error


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Return a JSON object that a store can keep.

    Args:
        text: the JSON text.
        where: name of the text in messages.

    Raises:
        DminError: it is not JSON, not an object, or :func:`odd` finds a problem in it.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DminError(f"{where} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise DminError(f"{where} is not a JSON object.")
    if reason := odd(found):
        raise DminError(f"{where}: {reason}.")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; refuse one with a repeated name."""
    if twice := repeated([name for name, _ in pairs]):
        raise ValueError(f"{twice!r} occurs twice in an object")
    return dict(pairs)


def repeated(names: Iterable[str]) -> str | None:
    """Return the first name that occurs more than once, or None."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def odd(value: Any, name: str = "it", depth: int = 0) -> str | None:
    """Return why a value cannot be stored as portable JSON; None if it can."""
    if depth > _DEEPEST:
        return f"{name} is nested more than {_DEEPEST} deep"
    if isinstance(value, dict):
        parts = [
            *((key, "a name in it") for key in value),
            *((v, str(k)) for k, v in value.items()),
        ]
        return next((why for v, n in parts if (why := odd(v, n, depth + 1))), None)
    if isinstance(value, list | tuple):
        return next((why for each in value if (why := odd(each, name, depth + 1))), None)
    if isinstance(value, str):
        if len(value) > _LONGEST:
            return f"{name} has {len(value):,} characters, more than {_LONGEST:,}"
        half = re.search("[\ud800-\udfff]", value)
        return f"{name} has an unpaired surrogate, which is not valid text" if half else None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} is {value}, which JSON cannot represent: write null"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"{name} is a number of more than 64 bits: write it as text"
    known = value is None or isinstance(value, int | float)
    return None if known else f"{name} is a {type(value).__name__}, not JSON: write it as text"
