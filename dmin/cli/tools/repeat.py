"""``dmin repeat FOLDER``: run a recorded command again and report what differs."""

import errno
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dmin.cli.config.renamed import CHECKS
from dmin.cli.help import COMMANDS, TOOLS
from dmin.cli.tools.arguments import Arguments
from dmin.runtime.errors import DminError
from dmin.runtime.escape import printable
from dmin.runtime.files import read_regular
from dmin.runtime.provenance import RECORD, circumstances

# Of results: what depends on the clock, the memory or the place, not on what was computed.
_INCIDENTAL = {"peak", "files", "store", "model", "figures"}
MOST_BYTES = 64 << 20  # of a record


PAGE = """
usage: dmin repeat RUN_FOLDER [--dry] [--trust] [setting=value ...]

RUN_FOLDER has the record.json and config.yaml of a run, as every command leaves them under
outputs/runs/ (and each job of a sweep under outputs/sweeps/). The settings are those of the record,
even if the YAML files have changed; settings given here override them. First it prints what differs
now (commit, versions, machine), at the end how the results differ.

  --dry    only print what differs, data and weights included, and which code would run that is not
           dmin's
  --trust  allow the record to name any code, such as a model of your own: only if you trust it

Results that already exist are reused; to compute them again: paths.outputs=another/folder.

examples:
  dmin repeat outputs/runs/collect/2025-01-31_12-00-00-000000
  dmin repeat outputs/runs/collect/2025-01-31_12-00-00-000000 paths.outputs=outputs/again
"""


def run(arguments: Sequence[str]) -> None:
    """Repeat a run, and report what differs."""
    parser = Arguments("repeat")
    parser.add_argument("folder", nargs="?", default=Path(), type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--trust", action="store_true")
    asked, settings = parser.parse_known_args(arguments)
    folder: Path = asked.folder
    record = read_record(folder)
    if "runs" in record:
        raise DminError(
            f"{folder} is an experiment of a checkout: python experiments repeat {folder.name}"
        )
    repeated = _checked(folder, record, settings)
    say("differs from the record", since(record))
    if asked.dry:
        say("data and weights", _read_again(record, repeated, settings, asked.trust))
        say("needs --trust", repeated.demands or ["nothing"])
    elif repeated.demands and not asked.trust:
        raise DminError(
            f"{folder / 'config.yaml'} names targets that dmin's own settings do not, which could "
            f"run arbitrary code: {'; '.join(repeated.demands)}. If you trust its source, "
            f"add --trust. Or override the value with key=value."
        )
    else:
        say("results", _repeated(record, repeated, settings, asked.trust))


class Repeated(NamedTuple):
    """A record to repeat: command, settings, chosen method, and what needs trust."""

    command: str
    settings: Any
    method: str | None
    demands: list[str]


def _checked(folder: Path, record: dict[str, Any], given: list[str]) -> Repeated:
    """Read a record, without composing or importing anything.

    Raises:
        DminError: it is not in the form that commands write.
    """
    from dmin.cli.config.trust import demands, read_settings

    command, method = record.get("command"), _part(record, "job").get("method")
    if not isinstance(command, str) or command not in COMMANDS or command in TOOLS:
        raise DminError(
            f"{folder} records the command {command}, which this version of dmin does not have."
        )
    if not isinstance(method, str | None) or not re.fullmatch(r"[\w-]*", method or ""):
        raise DminError(f"{folder / RECORD} is damaged (job.method={method!r}): nothing to repeat.")
    settings = read_settings(folder / "config.yaml")
    keys = {each.partition("=")[0].lstrip("+") for each in given if "=" in each}
    return Repeated(command, settings, method, demands(settings, command, folder, keys))


def _repeated(
    record: dict[str, Any], repeated: Repeated, settings: list[str], trust: bool
) -> list[str]:
    """Run it again, and report how the results differ."""
    from hydra.core.hydra_config import HydraConfig

    from dmin.cli.commands import step_of

    found: dict[str, Any] = {}
    step = step_of(repeated.command)

    def kept(cfg: Any) -> None:
        step(cfg)
        file = Path(HydraConfig.get().runtime.output_dir) / RECORD
        found.update(json.loads(file.read_text()))

    outputs = "${paths.outputs}/runs/" + repeated.command + "/${now:%Y-%m-%d_%H-%M-%S-%f}"
    _run(kept, repeated, settings, trust, outputs)
    return _compared(record, found)


def _read_again(
    record: dict[str, Any], repeated: Repeated, settings: list[str], trust: bool
) -> list[str]:
    """Report how data and weights differ from those of a record."""
    from dmin.runtime.fingerprint import differences

    then = _part(record, "made_of")
    if not then or (repeated.demands and not trust):
        why = "that would run the code listed below" if then else "the record does not have them"
        return [f"not compared: {why}"]
    now: dict[str, Any] = {}

    def look(cfg: Any) -> None:
        from dmin.cli.workspace.made_of import made_now
        from dmin.cli.workspace.workspace import Workspace

        now.update(made_now(Workspace(cfg, repeated.command), then))

    with tempfile.TemporaryDirectory(prefix="dmin-repeat-") as place:
        try:
            _run(look, repeated, [*settings, "hydra.output_subdir=null"], trust, f"'{place}'")
        except SystemExit as error:
            return [f"not compared: {error}"]
    return _in_time(differences(now, then)) or [f"the same as then ({', '.join(then)})"]


def _run(
    step: Callable[[Any], None], repeated: Repeated, settings: list[str], trust: bool, outputs: str
) -> None:
    """Run a step on the settings of a record."""
    from omegaconf import OmegaConf

    from dmin.cli.config.compose import run as run_step
    from dmin.cli.config.groups import config_directory

    # Composed from a copy of what was checked, so that no other file of the folder has a say.
    with tempfile.TemporaryDirectory(prefix="dmin-repeat-") as place:
        Path(place, "config.yaml").write_text(OmegaConf.to_yaml(repeated.settings), "utf-8")
        line = ["--config-path", place, "--config-name", "config", f"hydra.run.dir={outputs}"]
        # For the methods that a benchmark names, and what cfg.method is the choice of.
        line += ["--config-dir", str(config_directory())]
        if repeated.method:
            line.append(f"++hydra.runtime.choices.method={repeated.method}")
        run_step(step, repeated.command, [*line, *settings], from_here=trust)


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a run or of an experiment.

    Raises:
        DminError: there is none, or it is damaged.
    """
    try:
        record: Any = json.loads(read_regular(folder / RECORD, MOST_BYTES))
        if not isinstance(record, dict):
            raise ValueError("it is not a mapping")
        if "runs" in record or (folder / "config.yaml").is_file():
            return record
    except (ValueError, RecursionError) as error:
        raise DminError(f"{folder / RECORD} is damaged ({error}): nothing to repeat.") from error
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EFBIG):
            raise DminError(f"{folder / RECORD} is not a record: {error.strerror}.") from error
    raise DminError(
        f"{folder}: give the folder of a run, which has {RECORD} and config.yaml, such as "
        f"outputs/runs/collect/<date>. A command that was refused before it began has no "
        f"config.yaml."
    )


def _part(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a mapping of a record; empty if missing or of another type."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def since(then: dict[str, Any]) -> list[str]:
    """Report how code, versions, machine and folder differ from those of a record."""
    from dmin.runtime.fingerprint import differences

    now, lines = circumstances(), []
    for part in ("git", "versions", "machine"):
        ours, theirs = _part(now, part), _part(then, part)
        ours = {key: value for key, value in ours.items() if key != "threads"}  # not set yet
        theirs = {key: value for key, value in theirs.items() if key in ours or key != "threads"}
        lines += [f"{part}.{line}" for line in differences(ours, theirs)]
    for part in ("code", "folder"):
        if now[part] != then.get(part, now[part]):
            lines.append(f"{part}: {now[part]} here, {then[part]} there")
    if _part(then, "git").get("changed"):
        lines.append("git: the checkout there had uncommitted changes")
    return _in_time(lines) or ["nothing: commit, versions and machine are the same"]


def _compared(record: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Report how the results differ from those of the record."""
    from dmin.runtime.fingerprint import differences

    ours, theirs = (_essential(_part(each, "results")) for each in (found, record))
    if not theirs:
        return [f"nothing to compare: the recorded run was {record.get('outcome')}"]
    if made_of := _part(record, "made_of"):
        ours, theirs = {**ours, **_part(found, "made_of")}, {**theirs, **made_of}
    return _in_time(differences(ours, theirs)) or [f"the same as then ({', '.join(theirs)})"]


def _in_time(lines: Sequence[str]) -> list[str]:
    return [line.replace(" there", " then").replace(" here", " now") for line in lines]


def _essential(results: dict[str, Any]) -> dict[str, Any]:
    return {
        CHECKS.get(key, key): _essential(value) if isinstance(value, dict) else value
        for key, value in results.items()
        if key not in _INCIDENTAL
    }


def say(what: str, lines: Sequence[str]) -> None:
    """Print lines under a heading."""
    print(f"{what}:")
    for line in lines:
        print(f"  {printable(line)}")
