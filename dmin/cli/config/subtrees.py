"""Which parts of the configuration each command reads: only those are listed, shown and recorded.

Imports only the standard library, as the help pages use it.
"""

import re
from collections.abc import Iterable
from typing import Any

from dmin.runtime.errors import DminError

_COMMON = ("name", "seed", "tags", "paths", "extras", "logger", "trainer", "collect.wait_seconds")
_TRAINING = ("train", "model.path", "data", "trainer")
_FEATURES = ("model", "sketch", "timesteps", "noise", "collect", "data", "trainer", "shard")
# What has a "?" is read where another setting points to it, or the one behind the "?" is true.
READS = {
    "train": _TRAINING,
    "collect": _FEATURES,
    "doctor": (*_FEATURES, "doctor"),
    "sample": ("model", "queries", "data?"),  # what is generated is named after the data
    "retrieve": (*_FEATURES, "queries", "method", "index", "retrieve"),
    "serve": (*_FEATURES, "method", "index", "retrieve", "serve", "queries?serve"),
    "outliers": (*_FEATURES, "method", "outliers"),
    "losses": (*_FEATURES, "losses", "queries?losses.held_out"),
    "evaluate": (*_TRAINING, *_FEATURES, "method", "benchmark", "queries?"),
    "demo": (*_TRAINING, *_FEATURES, "queries", "method", "index", "retrieve", "benchmark"),
}
_POINTER = re.compile(r"\$\{(?:oc\.select:)?(\w[\w.]*)[}\[,]")  # ${data.size}


def needed(command: str) -> tuple[str, ...]:
    """Return the subtrees that a command requires."""
    return (*(each for each in READS[command] if "?" not in each), "logger")


def reads(command: str, place: str) -> bool:
    """Return whether a command reads a setting or a subtree; True for unknown ones."""
    return place.partition(".")[0] not in _known() or any(
        _overlap(place, each) for each in _read(command)
    )


def require_read(command: str, overrides: Iterable[str]) -> None:
    """Refuse settings on the command line that only other commands read.

    Raises:
        DminError: names the setting, and the commands that read it.
    """
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        place = re.split("[@:]", key)[-1].replace("/", ".")
        if not reads(command, place):
            others = [f"`dmin {each}`" for each in READS if reads(each, place)]
            raise DminError(
                f"{key} is a setting of {', '.join(others)}, which `dmin {command}` does not "
                f"read. Leave it out."
            )


def prune(cfg: Any, command: str) -> Any:
    """Leave in a composed configuration what a command reads, and what that points to; return it.

    What no command knows stays as well: it is refused by its name.
    """
    from omegaconf import OmegaConf, flag_override

    plain: Any = OmegaConf.to_container(cfg)
    asked = (each.partition("?") for each in READS[command])
    kept = [*(place for place, mark, by in asked if not mark or select(plain, by)), *_COMMON]
    for place in kept:  # which grows
        kept += {*_POINTER.findall(str(select(plain, place)))}.difference(kept)
    with flag_override(cfg, ["struct", "readonly"], False):
        for top in (_known() & {*cfg}).difference(kept):
            section = plain[top] if isinstance(plain[top], dict) else {}
            mine = {key for key in section if any(_overlap(f"{top}.{key}", each) for each in kept)}
            for key in section.keys() - mine if mine else ():
                del cfg[top][key]
            if not mine:
                del cfg[top]
    return cfg


def _read(command: str) -> tuple[str, ...]:
    return (*(each.partition("?")[0] for each in READS[command]), *_COMMON)


def _known() -> set[str]:
    return {place.partition(".")[0] for command in READS for place in _read(command)}


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def select(node: Any, place: str) -> Any:
    """Return the value at a dotted key of plain mappings; None if missing."""
    for key in place.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node
