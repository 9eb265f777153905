"""Explain an error in a configuration in one readable paragraph."""

import re
from collections.abc import Mapping
from typing import Any

import yaml
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from dmin.cli.config.groups import did_you_mean, groups
from dmin.runtime.errors import DminError
from dmin.runtime.files import machine_failure


def explain(error: BaseException) -> str | None:
    """Explain a user's error in one paragraph; None if the error is a defect."""
    if isinstance(error, DminError):
        return str(error)
    if isinstance(error, OverrideParseException):
        return _explain_syntax(error)
    if isinstance(error, MissingConfigException):
        return _explain_choice(error)
    if isinstance(error, ConfigCompositionException):
        return _explain_composition(error)
    if isinstance(error, yaml.YAMLError):
        return f"A configuration file is not valid YAML: {one_line(error)}."
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return explain(error.__cause__)  # whatever its target raised
    if isinstance(error, HydraException):
        return one_line(error)
    if isinstance(error, OmegaConfBaseException):
        return _explain_setting(error)
    if (failed := machine_failure(error)) is not None:
        return str(failed)
    return _explain_launcher(error)


def _explain_setting(error: OmegaConfBaseException) -> str:
    """Name the setting without a value, or whose value cannot be resolved."""
    key = error.full_key or str(error.key or "a setting")
    if isinstance(error, MissingMandatoryValue):
        return f"No value for {key}. Set {key}=<value>."
    reason = one_line(str(error).partition("\n")[0]).rstrip(".")
    return f"{key} cannot be used as it is: {reason}. Set {key}=<value>."


def _explain_launcher(error: BaseException) -> str | None:
    """Explain what a launcher lacks, or that one of its jobs was lost."""
    kind = type(error).__name__
    if kind in ("UncompletedJobError", "FailedJobError", "TerminatedWorkerError"):
        return (
            f"A job of the sweep was lost ({kind}: {one_line(error)}). The results of the other "
            "jobs are kept: run the same command again, it reuses them."
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
        f"Cannot read {override}: {reason}. Put quotes around a value with spaces, commas, "
        "brackets or '=', and quote them for the shell too: \"prompt='a cat, sitting'\"."
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
    return one_line(message).lstrip(": ")


def _dotted_keys(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            keys += _dotted_keys(value, f"{prefix}{key}.")
    return keys


def _sentences(first: str, *others: str) -> str:
    return " ".join(filter(None, (f"{one_line(first)}.", *others)))


def one_line(text: object) -> str:
    """Replace line breaks by spaces."""
    return " ".join(str(text).split())
