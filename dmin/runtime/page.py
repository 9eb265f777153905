"""Self-contained HTML pages: no network, no server; only their own script runs."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

SHELL = Path(__file__).with_name("page.html")
COLOURS = SHELL.with_name("colours.css")


def write_page(own: Path, title: str, data: Any, path: str | Path) -> Path:
    """Write a page: the shell, with the style and script that all share and those of its own.

    Args:
        own: the page's own style and script, without their suffixes `.css` and `.js`.
        title: of the page.
        data: JSON values, for the script; `colours` are those of the methods.
        path: of the file to write; its folder is created if it does not exist.

    Returns:
        The path.
    """
    style, script = (_read(SHELL, kind) + _read(own, kind) for kind in (".css", ".js"))
    style = _read(COLOURS, ".css") + style
    parts = {
        "TITLE": html.escape(title),
        # Only this script and this style may run: a name that smuggles in markup stays text.
        "SCRIPT_HASH": _hash(script),
        "STYLE_HASH": _hash(style),
        "SCRIPT": script,
        "STYLE": style,
        "DATA": _script_json(data),
    }
    # In one pass, so that nothing inside a part is taken for a placeholder.
    page = re.sub(r"\{\{([A-Z_]+)\}\}", lambda match: parts[match[1]], _read(SHELL, ".html"))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="backslashreplace")  # names that are no text
    return path


def _script_json(data: Any) -> str:
    """Write JSON that cannot end the script element it stands in, whatever its strings hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _read(file: Path, suffix: str) -> str:
    return file.with_suffix(suffix).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
