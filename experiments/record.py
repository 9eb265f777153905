"""The record of a script: what it was run with, kept beside its results (``record.json``).

``python experiments repeat NAME`` runs a recorded script again and says what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmin.runtime.provenance import (
    FINISHED,
    RECORD,
    SOURCES,
    circumstances,
    machine,
    peak_memory,
    write,
)

_PART = "DMIN_RECORDED"  # set for the processes that a recorded script starts
_NO_RESULTS = (*SOURCES, ".pyc", RECORD, "README.md")


@contextmanager
def recorded(script: str, **settings: Any) -> Iterator[None]:
    """Keep ``record.json`` beside the results of a script, and print how to repeat it.

    Every run that changed a result has its place in it; those of one command with the same code,
    versions and machine are one run in parts. A script that finds no results begins a new record;
    processes that it starts leave none.

    Args:
        script: its ``__file__``, an ``experiments/NAME/run.py``; the results are what it writes
            into its folder.
        settings: what else the results depend on, such as ``seeds=[0, 1]``; JSON values.
    """
    if _PART in os.environ:
        yield
        return
    file = Path(script).resolve()
    folder = file.parent
    before, start = results(folder), time.monotonic()
    run = {
        "command": [file.relative_to(file.parents[2]).as_posix(), *sys.argv[1:]],
        "settings": settings,
        **circumstances(),
    }
    del run["folder"]  # a script is repeated in a copy
    os.environ[_PART] = run["started"]
    try:
        yield
        run["outcome"] = FINISHED
    except BaseException as error:
        run["outcome"] = f"{type(error).__name__}: {error}".rstrip(": ")
        raise
    finally:
        del os.environ[_PART]
        run |= {
            "seconds": round(time.monotonic() - start, 2),
            "machine": machine(),  # once more: threads are set by now
            "peak_memory_bytes": peak_memory(),
        }
        after = results(folder)
        new = run.get("outcome") == FINISHED and not (folder / RECORD).is_file()
        if after != before or new:
            runs = _runs(folder) if before else []
            write(folder, {"runs": _with(runs, run), "results": after})
            print(f"again, elsewhere: python experiments repeat {folder.name}")


def results(folder: Path) -> dict[str, str]:
    """Return the digest of every result in the folder of an experiment: all but its sources."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(_NO_RESULTS)
    }


def _with(runs: list[dict[str, Any]], run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs and one more, which goes on with the last of them if all is the same."""
    same = ("command", "settings", "git", "code", "versions", "machine")
    if not runs or any(runs[-1].get(key) != _plain(run[key]) for key in same):
        return [*runs, run]
    last = runs[-1]
    seconds = round(last["seconds"] + run["seconds"], 2)
    peaks = last["peak_memory_bytes"], run["peak_memory_bytes"]
    return [
        *runs[:-1],
        run
        | {
            "started": last["started"],
            "parts": last.get("parts", 1) + 1,
            "seconds": seconds,
            "peak_memory_bytes": max(peaks, key=lambda peak: peak["process"]),
        },
    ]


def _runs(folder: Path) -> list[dict[str, Any]]:
    try:
        runs: list[dict[str, Any]] = json.loads((folder / RECORD).read_text())["runs"]
        return runs
    except (OSError, ValueError, KeyError):
        return []


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
