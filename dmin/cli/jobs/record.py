"""The record of a run: command, settings, versions, duration and results."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmin.cli.config.environment import kept, without_values
from dmin.cli.jobs.sweep import job_settings
from dmin.runtime.errors import DminError
from dmin.runtime.provenance import FINISHED, RECORD, circumstances, peak_memory, write


@contextmanager
def recorded(
    cfg: DictConfig, folder: Path, command: str, made_of: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[dict[str, Any]]:
    """Write ``record.json`` when a run starts and again when it ends, also by an error.

    Args:
        cfg: the composed configuration; written to ``config.yaml``, resolved except for environment
            variables.
        folder: the run's folder.
        command: name of the command.
        made_of: digests of the data and weights that the run has read.

    Yields:
        A mapping to put results into.

    Raises:
        DminError: the folder cannot be written.
    """
    results: dict[str, Any] = {}
    record = {**_asked(command), "outcome": "running", "seed": cfg.seed}
    settings, read = kept(cfg)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
        write(folder, record)
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
        record["peak_memory_bytes"] = peak_memory()
        record |= {"made_of": dict(made_of), "results": results}
        write(folder, without_values(record, read))


def note_failure(cfg: DictConfig, command: str, message: str) -> None:
    """Record a failed job, also one that failed before its record was written."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    file = folder / RECORD
    record = json.loads(file.read_text()) if file.is_file() else _asked(command)
    told = {"outcome": message, "seed": OmegaConf.to_container(cfg).get("seed")}  # type: ignore[union-attr]
    read: dict[str, str] = {}
    with suppress(OmegaConfBaseException):  # which may be why it failed
        _, read = kept(cfg)
    write(folder, without_values({**record, **told}, read))


def _asked(command: str) -> dict[str, Any]:
    """Return the command and the environment of the current job."""
    asked = {"command": command, "argv": sys.argv[1:], "job": job_settings()}
    return {**asked, **circumstances()}
