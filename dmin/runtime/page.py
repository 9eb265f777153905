"""HTML pages that need nothing else: no network, no server; only their own script runs."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any


def write_page(template: Path, title: str, data: Any, path: str | Path) -> Path:
    """Fill a template with data, and write it.

    Args:
        template: the file; has ``{{TITLE}}``, ``{{DATA}}`` (JSON inside a script element),
            ``{{SCRIPT_HASH}}`` and ``{{STYLE_HASH}}`` for its content security policy.
        title: of the page.
        data: JSON values.
        path: of the file to write; its folder is made if it is not there.

    Returns:
        The path.
    """
    text = template.read_text(encoding="utf-8")
    style, script = (_between(text, tag) for tag in ("style", "script"))
    parts = {
        "TITLE": html.escape(title),
        # Only this script and this style may run: a name that smuggles in markup stays text.
        "SCRIPT_HASH": _hash(script),
        "STYLE_HASH": _hash(style),
        "DATA": _script_json(data),
    }
    # In one pass, so that nothing inside a part is taken for a placeholder.
    page = re.sub(r"\{\{([A-Z_]+)\}\}", lambda match: parts[match[1]], text)
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


def _between(template: str, tag: str) -> str:
    found = re.search(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    assert found is not None, f"the template has no <{tag}>"
    return found[1]


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
