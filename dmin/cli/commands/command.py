"""Base class of the commands: workspace, printed settings, run record."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dmin.cli.config.tree import settings_tree
from dmin.cli.jobs.logger import log_results, make_logger
from dmin.cli.jobs.record import recorded
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.errors import DminError
from dmin.runtime.progress import titled, without_progress

Body = Callable[[Workspace, dict[str, Any]], None]


@dataclass(frozen=True)
class Command:
    """A command: prints the composed configuration, runs and records it.

    Args:
        body: a function that does the work and adds results to a mapping. Its name is the name of
            the command.
        prepare: changes the configuration before it is printed and run.
    """

    body: Body
    prepare: Callable[[DictConfig], None] | None = None

    @property
    def name(self) -> str:
        """The command's name."""
        return self.body.__name__

    def __call__(self, cfg: DictConfig) -> None:
        """Run the command."""
        if self.prepare is not None:
            self.prepare(cfg)
        work = Workspace(cfg, self.name)
        if not work.is_main:  # one of the processes that Lightning started for the main one
            self.body(work, {})
            return
        folder = _as_typed(work.run_folder)
        if cfg.extras.print_config:
            shown = settings_tree(self.name, cfg, folder / "config.yaml")
            work.notes.print(shown)
        with (
            without_progress(work.notes.quiet),
            recorded(cfg, work.run_folder, self.name, work.made_of) as results,
        ):
            work.logger = make_logger(cfg, work.run_folder)  # first, so that errors come early
            try:
                self.body(work, results)
            finally:
                log_results(work.logger, results, work.run_folder)
        work.notes.print(titled(f"to repeat: dmin repeat {folder}", style="dim"), soft_wrap=True)


def shown_count(work: Workspace, setting: str) -> int:
    """Return the number of examples to show, from a setting such as ``outliers.k``.

    Raises:
        DminError: the number is below one.
    """
    k = int(OmegaConf.select(work.cfg, setting))
    if k < 1:
        raise DminError(f"{setting}={k}: show 1 or more examples.")
    return k


def show_files(work: Workspace, *names: str) -> list[str]:
    """Print the paths of result files in the run's folder; return their names for its record."""
    files = (str(work.run_folder / name) for name in names)
    work.console.print("\n  ".join(["Results", *files]), soft_wrap=True)
    return list(names)


def _as_typed(folder: Path) -> Path:
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
