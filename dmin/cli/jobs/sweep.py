"""Sweeps: the output of each job in its own log, and one table of all jobs at the end."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dmin.cli.jobs.slurm import check_submission
from dmin.runtime.errors import DminError
from dmin.runtime.escape import read_csv, write_csv
from dmin.runtime.formatting import markdown_table
from dmin.runtime.provenance import FINISHED, RECORD

CALLBACK = "++hydra.callbacks.dmin_sweep._target_=dmin.cli.jobs.sweep.Sweep"
# What joblib's workers print would run into one another on the terminal.
_SHARES_TERMINAL = "JoblibLauncher"


class Job(NamedTuple):
    """One job of a sweep, from its record."""

    number: int
    settings: dict[str, str]  # its overrides
    outcome: str  # finished, running, or what went wrong
    seconds: float | None
    figures: dict[str, str]  # what came out, by name
    folder: Path

    @property
    def failed(self) -> bool:
        """Whether it did not finish; a job recorded as running was killed."""
        return self.outcome != FINISHED


class Sweep(Callback):
    """Hydra callback that records the folder of this process's sweep (:data:`CALLBACK`)."""

    folder: Path | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Record the folder, which Hydra does not pass later; check that the jobs can run."""
        try:
            check_submission(config)
        except DminError as error:  # Hydra would make a warning of it
            raise SystemExit(str(error)) from error
        Sweep.folder = Path(config.hydra.sweep.dir)


def in_sweep() -> bool:
    """Return whether the current job belongs to a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def job_settings() -> dict[str, Any]:
    """Return the settings that vary in a sweep, for this job's record."""
    hydra = HydraConfig.get()
    return {
        "number": hydra.job.num if in_sweep() else 0,
        "overrides": list(hydra.overrides.task),
        "method": hydra.runtime.choices.get("method"),
    }


@contextmanager
def own_output() -> Iterator[None]:
    """Send what a job prints to ``output.log`` in its folder, where jobs share a terminal.

    Its end is told on the terminal.
    """
    hydra = HydraConfig.get()
    if not in_sweep() or not hydra.launcher._target_.endswith(_SHARES_TERMINAL):
        yield
        return
    folder = Path(hydra.runtime.output_dir)
    sys.stdout.flush()
    sys.stderr.flush()
    terminals = os.dup(1), os.dup(2)
    with (folder / "output.log").open("a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, terminal in enumerate(terminals, 1):
                os.dup2(terminal, number)
                os.close(terminal)
            print(f"job {hydra.job.num} ended; its output: {folder / 'output.log'}")


def jobs(folder: Path) -> list[Job]:
    """Return the jobs of a sweep by their number, from the records in its folder."""
    found = []
    for file in folder.rglob(RECORD):
        try:
            record = json.loads(file.read_text())
        except (OSError, ValueError):
            continue  # being written, or cut off by a full disk
        job = record.get("job", {})
        pairs = (override.partition("=") for override in job.get("overrides", []))
        found.append(
            Job(
                job.get("number", 0),
                {key.lstrip("+"): value for key, _, value in pairs},
                record.get("outcome", "unknown"),
                record.get("seconds"),
                (record.get("results") or {}).get("figures", {}),
                file.parent,
            )
        )
    return sorted(found, key=lambda job: job.number)


def conclude(console: Console) -> str | None:
    """Print and save the table of the sweep that this process ran, if it ran one.

    Returns:
        A message if jobs failed, else None.
    """
    folder, Sweep.folder = Sweep.folder, None
    if folder is None or not (found := jobs(folder)):
        return None
    console.print(_table(found))
    _save(folder, found)
    _save_results(folder, found)
    console.print(f"The whole table is in\n  {folder / 'sweep.md'}", soft_wrap=True)
    failed = [job.number for job in found if job.failed]
    if not failed:
        return None
    return (
        f"{len(failed)} of {len(found)} jobs failed (number {', '.join(map(str, failed))}; the "
        "table has the reasons). The results of the others are kept: run the same command again, "
        "it reuses them."
    )


def _varied(found: Sequence[Job]) -> list[str]:
    """Return the settings that differ between jobs."""
    keys = dict.fromkeys(key for job in found for key in job.settings)
    return [key for key in keys if len({job.settings.get(key) for job in found}) > 1]


def _lines(found: Sequence[Job]) -> list[list[str]]:
    """Return the table: a header, then one line for each job, without empty columns."""
    settings = _varied(found)
    figures = dict.fromkeys(name for job in found for name in job.figures)
    lines = [["job", *settings, "outcome", "seconds", *figures, "why"]]
    for job in found:
        outcome = "did not end" if job.outcome == "running" else job.outcome
        lines.append(
            [
                str(job.number),
                *(job.settings.get(key, "") for key in settings),
                "failed" if job.failed else FINISHED,
                "" if job.seconds is None else f"{job.seconds:,.1f}",
                *(job.figures.get(name, "") for name in figures),
                outcome if job.failed else "",
            ]
        )
    return lines if any(job.failed for job in found) else [line[:-1] for line in lines]


def _table(found: Sequence[Job]) -> Table:
    head, *lines = _lines(found)
    table = Table(title=f"sweep of {len(found)} jobs", title_justify="left")
    for name, column in zip(head, zip(*lines, strict=True), strict=True):
        numbers = all(cell.replace(".", "").replace(",", "").isdecimal() for cell in column if cell)
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for job, line in zip(found, lines, strict=True):
        table.add_row(*line, style="red" if job.failed else None)
    return table


def _save(folder: Path, found: Sequence[Job]) -> None:
    """Write the table as CSV and Markdown, with the folder of each job."""
    folders = ["folder", *(str(job.folder) for job in found)]
    head, *lines = ([*line, place] for line, place in zip(_lines(found), folders, strict=True))
    write_csv(folder / "sweep.csv", (dict(zip(head, line, strict=True)) for line in lines))
    (folder / "sweep.md").write_text("\n".join(markdown_table(head, lines)), "utf-8")


def _save_results(folder: Path, found: Sequence[Job]) -> None:
    """Put the tables of results of all jobs (of `dmin evaluate`) into one."""
    rows: list[Mapping[str, Any]] = []
    for job in found:
        if (path := job.folder / "results.csv").is_file():
            told = {
                "job": str(job.number),
                **{key: job.settings.get(key, "") for key in _varied(found)},
            }
            rows += [{**told, **row} for row in read_csv(path)]
    if rows:
        write_csv(folder / "results.csv", rows)
