"""The provenance of a run: code, versions, machine, memory.

Commands keep it in their run folder (``dmin.cli.jobs.record``); ``dmin repeat RUN_FOLDER`` runs
them again and says what differs.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dmin.runtime.files import commit
from dmin.runtime.memory import peak_resident

RECORD = "record.json"
FINISHED = "finished"
PACKAGES = (
    *("dmin", "torch", "lightning", "diffusers", "transformers", "peft", "hydra-core"),
    *("omegaconf", "numpy", "h5py", "scikit-learn"),
)
SOURCES = (".py", ".yaml", ".toml")


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


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a record into a folder, whole or not at all."""
    text = json.dumps(record, indent=2, default=str) + "\n"
    commit(folder / RECORD, text.encode(), durable=False)


def git_state() -> dict[str, Any] | None:
    """Return the commit of the checkout dmin runs from, and whether sources in it are changed."""
    try:
        top = Path(_git("rev-parse", "--show-toplevel")).resolve()
        if top != Path(__file__).resolve().parents[2]:
            return None  # the project of a user, with dmin installed in its environment
        lines = _git("status", "--porcelain").splitlines()
        return {
            "sha": _git("rev-parse", "HEAD"),
            "changed": any(line.endswith(SOURCES) for line in lines),
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
    peak = {"process": peak_resident(children=True)}
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


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
