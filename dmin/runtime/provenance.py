"""What a run was done with: command, code, versions, machine, memory; written beside its results.

Commands keep it in their run folder (``dmin.cli.jobs.record``), scripts beside their results
(:func:`recorded`); ``dmin repeat FOLDER`` runs either again and says what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORD = "record.json"
FINISHED = "finished"
PACKAGES = (
    *("dmin", "torch", "lightning", "diffusers", "transformers", "peft", "hydra-core"),
    *("omegaconf", "numpy", "h5py", "scikit-learn"),
)
_PART = "DMIN_RECORDED"  # set for the processes that a recorded script starts
_SOURCES = (".py", ".yaml", ".toml")
_NO_RESULTS = (*_SOURCES, ".pyc", RECORD, "README.md")


def circumstances() -> dict[str, Any]:
    """Return with what code, versions and machine this process runs, where and since when."""
    return {
        "folder": _place(Path.cwd()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "code": _code(),
        "versions": _versions(),
        "machine": machine(),
    }


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
            print(f"again, elsewhere: dmin repeat {_place(folder)}")


def results(folder: Path) -> dict[str, str]:
    """Return the digest of every result in the folder of an experiment: all but its sources."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(_NO_RESULTS)
    }


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a record into a folder, whole or not at all."""
    new = folder / f".{RECORD}.{os.getpid()}"
    new.write_text(json.dumps(record, indent=2, default=str) + "\n")
    os.replace(new, folder / RECORD)


def git_state() -> dict[str, Any] | None:
    """Return the commit of the checkout dmin runs from, and whether sources in it are changed."""
    try:
        lines = _git("status", "--porcelain").splitlines()
        return {
            "sha": _git("rev-parse", "HEAD"),
            "changed": any(line.endswith(_SOURCES) for line in lines),
        }
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed wheel


def machine() -> dict[str, Any]:
    """Return what the machine is, without its name."""
    found: dict[str, Any] = {"platform": platform.platform(), "cores": os.cpu_count()}
    if "torch" in sys.modules:
        import torch

        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def peak_memory() -> dict[str, int]:
    """Return the most memory that this process, one it started, or its GPU's part had, in bytes."""
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    whose = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    peak = {"process": max(resource.getrusage(who).ru_maxrss for who in whose) * unit}
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


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


def _code() -> str:
    """Return a digest of dmin's own sources: the same for a wheel, and after a rebase."""
    here = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(here.rglob("*.py")):
        digest.update(f"{file.relative_to(here).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _place(path: Path) -> str:
    """Return a path as it is seen from the top of the checkout, if it is in it."""
    try:
        return path.relative_to(Path(_git("rev-parse", "--show-toplevel")).resolve()).as_posix()
    except (OSError, subprocess.CalledProcessError, ValueError):
        return str(path)


def _git(*arguments: str) -> str:
    place = ["git", "-C", str(Path(__file__).resolve().parent)]
    run = subprocess.run([*place, *arguments], capture_output=True, text=True, check=True)
    return run.stdout.strip()
