"""Print the settings of a run that differ from the defaults."""

from collections.abc import Iterator, Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.tree import Tree

from dmin.cli.config.annotations import parameters
from dmin.cli.config.environment import kept
from dmin.cli.config.sections import settings
from dmin.cli.config.targets import load
from dmin.runtime.progress import titled


def settings_tree(name: str, cfg: DictConfig, file: Path) -> Tree:
    """Return the settings that differ from their default, one line for each section.

    Args:
        name: of the command.
        cfg: the validated configuration.
        file: of all settings, which is mentioned.
    """
    tree = Tree(titled(f"dmin {name}"), guide_style="dim")
    values, _ = kept(cfg)
    for part, value in values.items():
        if part in ("extras", "paths") or value in (None, []):
            continue
        if told := _spelled(value, settings(part)):
            tree.add(titled(part, ": ").append(told, "cyan"))
    tree.add(titled(f"all settings: {file}", style="dim"))
    return tree


def _spelled(value: Any, known: Sequence[Parameter] = ()) -> str:
    """Format a value, or a node with a target as a call."""
    if isinstance(value, list):
        return f"[{', '.join(map(_spelled, value))}]"
    if not isinstance(value, dict):
        return str(value)
    if "_target_" not in value:
        return ", ".join(_changed(value, known))
    name = str(value["_target_"])
    given = {key: each for key, each in value.items() if not key.startswith("_")}
    known = parameters(load(name, name)) or ()
    return f"{_short(name)}({', '.join(_changed(given, known))})"


def _short(target: str) -> str:
    """Return a dotted name without its modules: ``DDPM.from_pretrained``, ``Auto``."""
    *modules, last = target.split(".")
    return f"{modules[-1]}.{last}" if modules and modules[-1][:1].isupper() else last


def _changed(given: Mapping[str, Any], known: Sequence[Parameter]) -> Iterator[str]:
    """Yield the settings that differ from their default."""
    default = {each.name: each.default for each in known}
    for key, value in given.items():
        if key not in default or _plain(default[key]) != value:
            nested = isinstance(value, dict) and "_target_" not in value
            told = _spelled(value)
            yield f"{key}={{{told}}}" if nested else f"{key}={told}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
