"""Run a command through Hydra: compose, translate old names, validate, run."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dmin.cli.config import auto
from dmin.cli.config.explain import explain, one_line
from dmin.cli.config.groups import config_directory
from dmin.cli.config.renamed import rename, warn_of
from dmin.cli.config.subtrees import needed, prune, require_read
from dmin.cli.config.validate import validate
from dmin.cli.jobs import sweep
from dmin.cli.jobs.processes import follow_parent, is_main
from dmin.cli.jobs.record import note_failure
from dmin.runtime.errors import DminWarning
from dmin.runtime.escape import printable
from dmin.runtime.progress import console

Step = Callable[[DictConfig], None]

# Hydra prints most errors itself and exits; with this variable it raises them.
_FULL_ERROR = "HYDRA_FULL_ERROR"


def run(
    step: Step,
    name: str,
    argv: list[str],
    from_here: bool = True,
    config: str = "dmin",
) -> None:
    """Compose the configuration, validate it and run a step on it, as ``dmin <name> <argv>``.

    Args:
        step: executes the command with the composed configuration.
        name: of the command and the job.
        argv: overrides and options of Hydra.
        from_here: whether code and conf/ in the working folder are used.
        config: the root configuration: ``conf/dmin.yaml``, or one made by `register`.

    Raises:
        SystemExit: with a message that says what is wrong with the configuration, or the one of
            the ``DminError`` that ended the step (status 1); with status 130 when interrupted.
        Exception: any other exception of the step, as it is. With HYDRA_FULL_ERROR=1 all of them.
    """
    follow_parent()
    _show_warnings_plainly()
    job = _Job(step, name, from_here, list(sys.argv), os.environ.get(_FULL_ERROR))
    try:
        first = [f"hydra.job.name={name}", sweep.CALLBACK, *(_own_settings() if from_here else [])]
        options, overrides = _taken_apart(argv)
        require_read(name, overrides)
        with _process([sys.argv[0], *options, "--", *first, *overrides], "1"), _shown_pruned(name):
            try:
                _hydra_main(job, config)
            finally:
                failures = sweep.conclude(console())
        if failures is not None:
            raise SystemExit(failures)
    except KeyboardInterrupt:
        _interrupted()
    except SystemExit as end:
        # Lightning tidies up after an interrupt, then exits with 1.
        if isinstance(end.__context__, KeyboardInterrupt):
            _interrupted()
        raise
    except Exception as error:
        message = job.explained(error)
        # Before the step started, the only files touched are those of Hydra's run folder. Hydra's
        # own OSErrors have no number.
        gone = isinstance(error, FileNotFoundError) and not error.filename  # the working folder
        if not job.started and isinstance(error, OSError) and error.errno and not gone:
            message = (
                f"the run folder {error.filename or 'of this command'} cannot be "
                f"written ({error.strerror}). Set paths.outputs to a folder with write permission "
                "and free space."
            )
        if message is None:
            raise
        raise SystemExit(printable(message)) from error


@dataclass
class _Job:
    """A step as called by Hydra, with the user's own command line and environment."""

    step: Step
    name: str
    from_here: bool
    argv: list[str]
    full_error: str | None
    started: bool = False

    def __call__(self, cfg: DictConfig) -> None:
        self.started = True
        with _process(self.argv, self.full_error):
            cwd = HydraConfig.get().runtime.cwd
            if self.from_here and cwd not in sys.path:
                sys.path.append(cwd)  # so that `_target_: my_model.MyModel` is found where one is
            try:
                with sweep.own_output():
                    self._attempt(cfg)
            except Exception as error:
                # Hydra's note on the error would only get in the way of the message, and a
                # SystemExit passes it by.
                if (message := self.explained(error)) is not None:
                    raise SystemExit(printable(message)) from error
                raise

    def explained(self, error: Exception) -> str | None:
        """Return the message for an error; None to show its traceback."""
        return None if self.full_error == "1" else explain(error)

    def _attempt(self, cfg: DictConfig) -> None:
        """Validate and run. A failed job of a sweep leaves a record, and the others run on."""
        try:
            prune(cfg, self.name)
            renamed = rename(cfg)
            told = auto.resolve(cfg)
            validate(cfg, needed(self.name))
            if is_main(cfg.get("trainer") or {}):
                warn_of(renamed)
                if told:
                    console().print(told, soft_wrap=True, highlight=False)
            self.step(cfg)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.RUN:
                raise
            message = self.explained(error)
            if message is None:
                traceback.print_exc()
            note_failure(cfg, self.name, message or f"{type(error).__name__}: {one_line(error)}")
            told = printable(f"job {HydraConfig.get().job.num} failed: {message or error}")
            print(told, file=sys.stderr)


def complete(arguments: list[str]) -> None:
    """Let Hydra install, remove or answer a shell completion; ``arguments`` say which."""
    # Hydra knows programs, not commands: "dmin collect mod" reaches it as "dmin mod".
    program, _, rest = os.environ.get("COMP_LINE", "").partition(" ")
    os.environ["COMP_LINE"] = f"{program} {rest.partition(' ')[2]}"
    with _process([sys.argv[0], "--shell-completion", *arguments], os.environ.get(_FULL_ERROR)):
        _hydra_main(lambda cfg: None)


def _interrupted() -> NoReturn:
    print("Interrupted.", file=sys.stderr)
    raise SystemExit(130) from None


def _taken_apart(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the options of Hydra, and the overrides.

    Options among the overrides (``seed=1 -m model=a,b``, or what Lightning adds for its other
    processes) are an error to argparse before Python 3.12.
    """
    overrides = get_args_parser().parse_intermixed_args(argv).overrides
    options = list(argv)
    for override in overrides:
        options.remove(override)
    return options, overrides


def _own_settings() -> list[str]:
    """Return the option that adds conf/ of the working folder, if it has conf/local."""
    here = Path.cwd() / "conf"
    if not (here / "local").is_dir() or here == config_directory():
        return []
    place = str(here).replace("${", "\\${").replace('"', r"\"")
    return [f'hydra.searchpath=["file://{place}"]']


def _hydra_main(job: Step, config: str = "dmin") -> None:
    directory = str(config_directory())
    hydra.main(version_base="1.3", config_path=directory, config_name=config)(job)()


@contextmanager
def _shown_pruned(command: str) -> Iterator[None]:
    """Let ``--cfg job`` print only what the command reads; Hydra has no hook for it."""
    theirs = Hydra.get_sanitized_cfg

    def ours(self: Hydra, cfg: DictConfig, cfg_type: str) -> DictConfig:
        return theirs(self, cfg if cfg_type == "hydra" else prune(cfg, command), cfg_type)

    Hydra.get_sanitized_cfg = ours  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_sanitized_cfg = theirs  # type: ignore[method-assign]


def _show_warnings_plainly() -> None:
    """Show warnings for users without their location in the code."""
    plain = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, DminWarning):
            print(printable(f"Warning: {message}"), file=sys.stderr)
        else:
            plain(message, category, *where, **more)

    if plain.__module__ != __name__:
        warnings.showwarning = show


@contextmanager
def _process(argv: list[str], full_error: str | None) -> Iterator[None]:
    """Temporarily change the process state that Hydra reads."""
    before = sys.argv, os.environ.pop(_FULL_ERROR, None)
    sys.argv = argv
    os.environ.update({} if full_error is None else {_FULL_ERROR: full_error})
    try:
        yield
    finally:
        sys.argv, full_error = before
        os.environ.pop(_FULL_ERROR, None)
        os.environ.update({} if full_error is None else {_FULL_ERROR: full_error})
