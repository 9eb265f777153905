"""Reading all files of a dataset once: what each holds, and whether it can be read at all."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from dmin.data.pixels import Unreadable
from dmin.fingerprint import fingerprint

LARGE = 64 << 20
"""Reading more bytes than this shows a progress bar, and what was found is kept on disk."""

# A file changed twice within one tick of the file system's clock keeps its time: what was changed
# this recently is not kept.
_SETTLED_NS = 2_000_000_000


class Survey(NamedTuple):
    """What reading all files found."""

    digests: dict[str, str]  # file -> digest of its bytes, of those that can be read
    problems: dict[str, str]  # file -> why it cannot be read


def read_bytes(path: Path, name: str) -> bytes:
    """Return the content of a file.

    Args:
        path: the file.
        name: what to call it in a message.

    Raises:
        Unreadable: there is no such file, or the system refuses it.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        reason = "there is no such file, or it is a link that leads nowhere"
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
    raise Unreadable(name, reason)


def survey(
    root: Path,
    files: Sequence[str],
    check: Callable[[bytes, str], None] | None = None,
    settings: dict[str, Any] | None = None,
) -> Survey:
    """Read every file once, several at a time; digest each, and check it if asked.

    For large folders what was found is kept by size and time of change, so that later commands
    only ask the file system. It is kept in the user's cache folder (``$XDG_CACHE_HOME/dmin``),
    not beside the data, which is often read-only and shared. Only files in order are kept: one
    that failed is tried again. Deleting the cache is always safe.

    Args:
        root: the folder.
        files: their paths below it.
        check: takes content and name, raises :class:`Unreadable`; None reads the bytes only.
        settings: what the outcome of ``check`` depends on.
    """
    record = _record_path(root, {"checked": check is not None, **(settings or {})})
    known, stamps = _load(record), {file: _stamp(root / file) for file in files}
    fresh = [file for file in files if known.get(file, [None])[:2] != stamps[file]]
    amount = sum(stamps[file][0] for file in fresh)
    digests = {file: known[file][2] for file in set(files).difference(fresh)}
    problems = {}

    def read(file: str) -> tuple[str | None, str | None]:
        try:
            content = read_bytes(root / file, file)
            if check is not None:
                check(content, file)
        except Unreadable as error:
            return None, error.reason
        return hashlib.sha256(content).hexdigest(), None

    now = time.time_ns()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = track(
            pool.map(read, fresh),
            f"reading {root.name}",
            len(fresh),
            transient=True,
            disable=amount < LARGE,
        )
        for file, (digest, problem) in zip(fresh, found, strict=True):
            if digest is not None:
                digests[file] = digest
            else:
                problems[file] = problem or ""
    if amount >= LARGE:
        settled = {f: d for f, d in digests.items() if stamps[f][1] < now - _SETTLED_NS}
        _save(record, known | {file: [*stamps[file], digest] for file, digest in settled.items()})
    return Survey(digests, problems)


def _stamp(path: Path) -> list[int]:
    try:
        found = path.stat()
    except OSError:
        return [0, 0]
    return [found.st_size, found.st_mtime_ns]


def _record_path(root: Path, settings: dict[str, Any]) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "dmin" / f"{fingerprint({'root': str(root.resolve()), **settings})}.json"


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError):  # none there yet, or cut off: read the files themselves
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _save(path: Path, entries: dict[str, list[Any]]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(entries))
        partial.replace(path)
    except OSError:
        return  # a full or read-only disk costs the time to read the files again, no more
