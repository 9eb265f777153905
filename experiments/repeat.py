"""``python experiments repeat NAME``: run a recorded script again in a copy, compare its results.

It runs with nothing of what it had kept; the results recorded stay as they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from dmin.cli.tools.repeat import read_record, say, since
from dmin.runtime.errors import DminError
from dmin.runtime.escape import printable
from dmin.runtime.provenance import RECORD

_COPIED = ("experiments", "conf", "docs")  # of the checkout: what scripts read and write


def run(arguments: Sequence[str]) -> int:
    """Repeat an experiment; return the exit status, 1 where what was asked for is wrong."""
    parser = argparse.ArgumentParser("python experiments repeat", description=__doc__)
    parser.add_argument("name", help="of an experiment that has a record.json, or its folder")
    parser.add_argument("--dry", action="store_true", help="say what differs, run nothing")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="where the copy is made "
                        "(outputs/repeats/...); what was begun there goes on")  # fmt: skip
    asked = parser.parse_args(arguments)
    folder = Path(asked.name)
    if not folder.is_dir():
        folder = Path(__file__).parent / asked.name
    try:
        record = read_record(folder)
        if "runs" not in record:
            raise DminError(f"{folder} is the run of a command: dmin repeat {folder}")
        commands = _commands(folder, record)
        say("differs from the record", since(record["runs"][-1]))
        if asked.dry:
            say("would run", [f"python {' '.join(command)}" for command in commands])
        else:
            say("results", repeat(folder, commands, list(record["results"]), asked.into))
    except DminError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _commands(folder: Path, record: dict[str, Any]) -> list[list[str]]:
    """Return the commands of a record, each once: scripts of its own folder and their arguments.

    Raises:
        DminError: the record is damaged, or names a script or a result elsewhere.
    """
    own, top = folder.resolve(), folder.resolve().parents[1]
    runs, results = record["runs"], record.get("results")
    try:
        commands = [list(c) for c in dict.fromkeys(tuple(run["command"]) for run in runs)]
        places = [*(top / command[0] for command in commands), *(own / name for name in results)]
        whole = all(isinstance(word, str) for command in commands for word in command)
    except (TypeError, KeyError, IndexError) as error:
        raise DminError(f"{folder / RECORD} is damaged: nothing to repeat.") from error
    if not commands or not whole or not isinstance(results, dict):
        raise DminError(f"{folder / RECORD} is damaged: nothing to repeat.")
    for place in places:
        if not place.resolve().is_relative_to(own):
            raise DminError(
                f"{folder / RECORD} names {place}, which is outside of {folder}: only the scripts "
                f"of an experiment's own folder are run, and only its own results compared."
            )
    return commands


def repeat(
    folder: Path, commands: list[list[str]], results: list[str], into: Path | None
) -> list[str]:
    """Run a record's commands again in a copy without their results; say how these differ.

    Args:
        folder: of the experiment; nothing in it is touched.
        commands: scripts and arguments.
        results: names of the files they made.
        into: where the copy is made; what was begun there goes on. A new folder if None.

    Raises:
        DminError: the scripts are not there, or one of them failed.
    """
    top = folder.resolve().parents[1]
    for script in dict.fromkeys(command[0] for command in commands):
        if not (top / script).is_file():
            raise DminError(
                f"{folder / RECORD} names {script}, which is not in {top}: repeat it in a checkout "
                f"of the commit it was made with."
            )
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    into = into or Path("outputs/repeats") / f"{folder.resolve().name}-{now}"
    copy = into / folder.resolve().relative_to(top)
    if not copy.is_dir():
        left = {folder.resolve() / name for name in (*results, RECORD)}
        for name in _COPIED:
            if (top / name).is_dir():
                shutil.copytree(top / name, into / name, symlinks=True, ignore=_but(left))
    code = str(Path(__file__).resolve().parents[1])
    paths = [code, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for command in commands:
        print(printable(f"in {into}: python {' '.join(command)}"), flush=True)
        status = subprocess.run([sys.executable, *command], cwd=into, env=environment).returncode
        if status:
            raise DminError(
                f"{command[0]} ended with status {status}. What it did is in {into}: `python "
                f"experiments repeat {folder.name} --into {into}` goes on there."
            )
    print(f"the new results: {copy}")
    return [line for name in results for line in _compared(folder / name, copy / name)]


def _but(results: set[Path]) -> Any:
    """Return a filter of ``copytree`` that leaves out results, and what Python made."""

    def ignored(place: str, names: list[str]) -> set[str]:
        return {n for n in names if n == "__pycache__" or Path(place) / n in results}

    return ignored


def _compared(then: Path, now: Path) -> Iterator[str]:
    """Say how a result differs from what it was, by column where it is a table."""
    if not now.is_file():
        yield f"{then.name}: not made again"
    elif not then.is_file():
        yield f"{then.name}: the one recorded is gone, nothing to compare with"
    elif then.read_bytes() == now.read_bytes():
        yield f"{then.name}: the same, byte for byte"
    elif then.suffix not in (".csv", ".json"):
        yield f"{then.name}: not the same bytes"
    else:
        yield from (f"{then.name}: {line}" for line in _columns(_values(then), _values(now)))


def _columns(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say for each column in how many values two tables differ, and by how much."""
    lines = []
    if then.keys() != now.keys():
        lines.append(f"{len(now.keys() - then.keys())} values more, "
                     f"{len(then.keys() - now.keys())} less")  # fmt: skip
    columns: dict[str, list[tuple[Any, Any]]] = {}
    for key in then.keys() & now.keys():
        columns.setdefault(key.rpartition("/")[2], []).append((then[key], now[key]))
    for name, pairs in sorted(columns.items()):
        unlike = [(a, b) for a, b in pairs if a != b]
        if not unlike:
            continue
        numbers = [(a, b) for a, b in unlike if isinstance(a, float) and isinstance(b, float)]
        apart = max((abs(a - b) / max(abs(a), abs(b)) for a, b in numbers), default=0.0)
        much = f", by at most {apart:.2g} of itself" if numbers else ""
        lines.append(f"{name or 'values'} differs in {len(unlike)} of {len(pairs)}{much}")
    return lines or ["the same values, written otherwise"]


def _values(file: Path) -> dict[str, Any]:
    """Return the values of a table by place and column: numbers as such."""
    text = file.read_text()
    if file.suffix == ".json":
        return dict(_leaves(json.loads(text)))
    rows = csv.DictReader(text.splitlines())
    return {f"{n}/{key}": _number(cell) for n, row in enumerate(rows) for key, cell in row.items()}


def _leaves(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{place}/{key}")
    elif isinstance(node, list):
        for value in enumerate(node):
            yield from _leaves(value[1], f"{place}[{value[0]}]")
    else:
        yield place, _number(node)


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
