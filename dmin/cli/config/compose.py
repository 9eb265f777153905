"""Hand a command over to Hydra, and turn what a user got wrong into one readable paragraph."""

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dmin.cli.config.renamed import rename, warn_of
from dmin.cli.config.validate import validate
from dmin.cli.help import config_directory, did_you_mean, groups
from dmin.cli.jobs import sweep
from dmin.cli.jobs.processes import follow_parent, is_main
from dmin.cli.jobs.record import note_failure
from dmin.runtime.errors import DminError, DminWarning
from dmin.runtime.progress import console

Step = Callable[[DictConfig], None]

# Hydra prints most errors itself and exits; with this variable it raises them.
_FULL_ERROR = "HYDRA_FULL_ERROR"


def needs(*subtrees: str) -> Callable[[Step], Step]:
    """Declare the parts of the configuration that a step reads, for ``validate``.

    Only these must have all their values, and only their targets are imported. A step without
    the declaration needs everything.

    Args:
        subtrees: dotted names, such as ``"model"`` or ``"queries.sampler"``.
    """

    def declare(step: Step) -> Step:
        step.needs = subtrees  # type: ignore[attr-defined]
        return step

    return declare


def run(step: Step, name: str, argv: list[str]) -> None:
    """Compose the configuration, validate it and run a step on it, as ``dmin <name> <argv>``.

    Args:
        step: what the command does with the composed configuration.
        name: the command, which names the job.
        argv: overrides and options of Hydra.

    Raises:
        SystemExit: with a message that says what is wrong with the configuration, or the one of
            the ``DminError`` that ended the step (status 1); with status 130 when interrupted.
        Exception: any other exception of the step, as it is. With HYDRA_FULL_ERROR=1 all of them.
    """
    follow_parent()
    _show_warnings_plainly()
    theirs = list(sys.argv), os.environ.get(_FULL_ERROR)
    started = False

    def job(cfg: DictConfig) -> None:
        nonlocal started
        started = True
        # The step, and the processes it starts, see the command line and environment they know.
        with _process(*theirs):
            cwd = HydraConfig.get().runtime.cwd
            if cwd not in sys.path:
                sys.path.append(cwd)  # so that `_target_: my_model.MyModel` is found where one is
            try:
                with sweep.own_output():
                    _attempt(step, name, cfg, full=theirs[1] == "1")
            except (DminError, InstantiationException) as error:
                # Hydra's note on the error would only get in the way of the message, and a
                # SystemExit passes it by.
                message = None if theirs[1] == "1" else explain(error)
                if message is not None:
                    raise SystemExit(message) from error
                raise

    try:
        with _process([sys.argv[0], *_sorted(argv, f"hydra.job.name={name}", sweep.CALLBACK)], "1"):
            try:
                _hydra_main(job)
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
        message = None if theirs[1] == "1" else explain(error)
        # Before the step started, the only files touched are those of Hydra's run folder.
        if message is None and isinstance(error, OSError) and error.filename and not started:
            message = (
                f"the run folder {error.filename} cannot be written ({error.strerror}). Set "
                "paths.outputs to a folder with write permission and free space."
            )
        if message is None:
            raise
        raise SystemExit(message) from error


def _attempt(step: Step, name: str, cfg: DictConfig, full: bool) -> None:
    """Validate and run a step. A failed job of a sweep leaves a record, and the others run on."""
    try:
        renamed = rename(cfg)
        validate(cfg, getattr(step, "needs", None))
        if is_main(cfg.get("trainer") or {}):
            warn_of(renamed)
        step(cfg)
    except Exception as error:
        if HydraConfig.get().mode == RunMode.RUN:
            raise
        message = None if full else explain(error)
        if message is None:
            traceback.print_exc()
        note_failure(cfg, name, message or f"{type(error).__name__}: {_one_line(error)}")
        print(f"job {HydraConfig.get().job.num} failed: {message or error}", file=sys.stderr)


def complete(arguments: list[str]) -> None:
    """Let Hydra install, remove or answer a shell completion; ``arguments`` say which."""
    # Hydra knows programs, not commands: "dmin collect mod" reaches it as "dmin mod".
    program, _, rest = os.environ.get("COMP_LINE", "").partition(" ")
    os.environ["COMP_LINE"] = f"{program} {rest.partition(' ')[2]}"
    with _process([sys.argv[0], "--shell-completion", *arguments], os.environ.get(_FULL_ERROR)):
        _hydra_main(lambda cfg: None)


def explain(error: BaseException) -> str | None:
    """Say in one paragraph what a user got wrong; None when the error is a defect instead."""
    if isinstance(error, DminError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return _explain_syntax(error)
    if isinstance(error, MissingConfigException):
        return _explain_choice(error)
    if isinstance(error, ConfigCompositionException):
        return _explain_composition(error)
    if isinstance(error, yaml.YAMLError):
        return f"A configuration file is not valid YAML: {_one_line(error)}."
    if isinstance(error, InstantiationException):
        # Raised by `instantiate` around whatever its target raised.
        cause = error.__cause__
        return None if cause is None else explain(cause)
    if isinstance(error, CompactHydraException):
        return _one_line(error)
    return _explain_launcher(error)


def _explain_launcher(error: BaseException) -> str | None:
    """Say what a launcher lacks, or that one of its jobs was lost."""
    kind = type(error).__name__
    if kind in ("UncompletedJobError", "FailedJobError", "TerminatedWorkerError"):
        return (
            f"A job of the sweep was lost ({kind}: {_one_line(error)}). What the others made is "
            f"kept, and the same command finds it done."
        )
    missing = re.search(
        r"Unknown plugin class : '(hydra_plugins\.hydra_(\w+?)_launcher\..*?)'", str(error)
    )
    if missing is None:
        return None
    extra = {"submitit": "slurm"}.get(missing[2], missing[2])
    return (
        f"This hydra/launcher needs hydra-{missing[2]}-launcher, which is not installed: pip "
        f"install 'dmin[{extra}]'. Without it, -m runs the jobs one after the other "
        f"(hydra/launcher=basic)."
    )


def _explain_syntax(error: OverrideParseException) -> str:
    override = error.override
    if "=" not in override and not override.startswith("~"):
        return f"{override} is not a setting: write key=value, as in {override}=..."
    reason = str(error.message).partition("\n")[0]
    return (
        f"Cannot read {override}: {reason}. A value with spaces, commas, brackets or '=' wants "
        "quotes that reach the program, as in \"prompt='a cat, sitting'\"."
    )


def _explain_choice(error: MissingConfigException) -> str:
    first = str(error).partition("\n")[0].rstrip(".")
    if not error.options:
        places = re.findall(r"path=(?:file://)?(?!\w+://)([^,\n]+)", str(error))
        return _sentences(first, f"Looked in: {', '.join(places)}." if places else "")
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    return _sentences(
        first,
        did_you_mean(choice, error.options),
        f"Choices of {group}: {', '.join(error.options)}.",
    )


def _explain_composition(error: ConfigCompositionException) -> str:
    cause = error.__cause__
    message = str(error)
    unset = re.match(r"You must specify '(.+)', e\.g", message)
    if unset:
        choices = ", ".join(message.partition("Available options:")[2].split())
        return f"No choice of {unset[1]}. Set {unset[1]}=<choice>. Choices: {choices}."
    unknown = re.match(r"Could not override '(.+)'\.", message)
    if unknown and isinstance(cause, ConfigAttributeError | ConfigKeyError):
        key = unknown[1]
        # What was composed so far hangs on the exception, by the node that lacks the key.
        root = None if cause.parent_node is None else cause.parent_node._get_root()
        tree: Any = OmegaConf.to_container(root) if isinstance(root, DictConfig) else {}
        if not key.startswith("hydra."):
            tree.pop("hydra", None)  # three hundred settings that few people mean
        return _sentences(
            f"There is no setting {key}",
            did_you_mean(key, [*_dotted_keys(tree), *groups()]),
            "--cfg job shows all settings.",
        )
    if isinstance(cause, OmegaConfBaseException):
        # Its message has the reason on its first line, then where in OmegaConf it arose.
        reason = str(cause).partition("\n")[0]
        message = f"{message.replace('Error merging override ', 'Cannot set ')}: {reason}"
    return _one_line(message).lstrip(": ")


def _dotted_keys(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            keys += _dotted_keys(value, f"{prefix}{key}.")
    return keys


def _sentences(first: str, *others: str) -> str:
    return " ".join(filter(None, (f"{_one_line(first)}.", *others)))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _interrupted() -> NoReturn:
    print("Interrupted.", file=sys.stderr)
    raise SystemExit(130) from None


def _sorted(argv: list[str], *first: str) -> list[str]:
    """Put options before overrides, and some overrides before the others, which then win.

    Options among the overrides (``seed=1 -m model=a,b``, or what Lightning adds for its other
    processes) are an error to argparse before Python 3.12.
    """
    overrides = get_args_parser().parse_intermixed_args(argv).overrides
    options = list(argv)
    for override in overrides:
        options.remove(override)
    return [*options, "--", *first, *overrides]


def _hydra_main(job: Step) -> None:
    directory = str(config_directory())
    hydra.main(version_base="1.3", config_path=directory, config_name="dmin")(job)()


def _show_warnings_plainly() -> None:
    """Have warnings that are meant for the user shown without the place in the code."""
    plain = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, DminWarning):
            print(f"Warning: {message}", file=sys.stderr)
        else:
            plain(message, category, *where, **more)

    if plain.__module__ != __name__:
        warnings.showwarning = show


@contextmanager
def _process(argv: list[str], full_error: str | None) -> Iterator[None]:
    """Change the two things of the process that Hydra reads, for a while."""

    def change(argv: list[str], full_error: str | None) -> None:
        sys.argv = argv
        if full_error is None:
            os.environ.pop(_FULL_ERROR, None)
        else:
            os.environ[_FULL_ERROR] = full_error

    before = sys.argv, os.environ.get(_FULL_ERROR)
    change(argv, full_error)
    try:
        yield
    finally:
        change(*before)
