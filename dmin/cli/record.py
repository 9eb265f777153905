"""The record of a run: what was asked, with what versions, where, how long, and what came out."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from dmin.cli.repeat import RECORD
from dmin.cli.sweep import FINISHED, job_settings
from dmin.errors import DminError

PACKAGES = (
    *("dmin", "torch", "lightning", "diffusers", "transformers", "peft", "hydra-core"),
    *("omegaconf", "numpy", "h5py", "scikit-learn"),
)


@contextmanager
def recorded(cfg: DictConfig, folder: Path, command: str) -> Iterator[dict[str, Any]]:
    """Write ``record.json`` when a run starts and again when it ends, however it ends.

    Args:
        cfg: the composed configuration; written resolved, as ``config.yaml``.
        folder: the run's folder.
        command: name of the command.

    Yields:
        A mapping to put results into.

    Raises:
        DminError: the folder cannot be written.
    """
    results: dict[str, Any] = {}
    record = {**circumstances(command), "outcome": "running", "seed": cfg.seed}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        _write(folder, record)
    except OSError as error:
        raise DminError(
            f"the run folder {folder} cannot be written ({error.strerror}). Set paths.outputs to a "
            f"folder with write permission and free space."
        ) from error
    start = time.monotonic()
    try:
        yield results
        record["outcome"] = FINISHED
    except BaseException as error:
        record["outcome"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        record["seconds"] = round(time.monotonic() - start, 2)
        record["peak_memory_bytes"] = _peak_memory()
        record["results"] = results
        _write(folder, record)


def circumstances(command: str, job: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what a run was asked, and with what code and machine, before it starts.

    Args:
        command: name of the command.
        job: the overrides; those of Hydra's job at hand if None.
    """
    return {
        "command": command,
        "argv": sys.argv[1:],
        "folder": str(Path.cwd()),
        "job": job_settings() if job is None else job,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(),
        "versions": _versions(),
        "machine": _machine(),
    }


def note_failure(cfg: DictConfig, command: str, message: str) -> None:
    """Leave a record of a job that failed, also of one that failed before it had any."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    file = folder / RECORD
    record = json.loads(file.read_text()) if file.is_file() else circumstances(command)
    _write(folder, {**record, "outcome": message, "seed": cfg.get("seed")})


def git_state() -> dict[str, Any] | None:
    """Return the commit of the checkout that dmin runs from, and whether it has changes."""
    place = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(place), *arguments], capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    try:
        return {"sha": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed wheel


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {"platform": platform.platform(), "cores": os.cpu_count()}
    if "torch" in sys.modules:
        import torch

        machine["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _peak_memory() -> dict[str, int]:
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def _write(folder: Path, record: dict[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=2, default=str) + "\n")
