"""Translate the names in configurations and records of earlier releases.

Old names occur in composed configurations (a user's own YAML files, overrides, or a repeated
record) and in the settings saved with a trained model. The table is in
``renamed.yaml``.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.resources import files
from typing import Any

import yaml
from omegaconf import OmegaConf, flag_override

from dmin.runtime.errors import DminWarning

_TABLES = yaml.safe_load(files("dmin.cli.config").joinpath("renamed.yaml").read_text("utf-8"))
TARGETS: dict[str, str | dict[str, Any]] = _TABLES["targets"]
SETTINGS: dict[str, dict[str, str]] = _TABLES["settings"]
CHECKS: dict[str, str] = _TABLES["checks"]
UNSAID: dict[str, dict[str, Any]] = _TABLES["unsaid"]


def current(name: str) -> tuple[str, dict[str, Any]]:
    """Return the current name of a ``_target_`` of any release, and settings that it implied."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        found = TARGETS.get(".".join(parts[:end]))
        if found is not None:
            settings = {"_target_": found} if isinstance(found, str) else copy.deepcopy(found)
            return ".".join([settings.pop("_target_"), *parts[end:]]), settings
    return name, {}


def rename(node: Any) -> dict[str, str]:
    """Rename every old target in a configuration, or in plain mappings and lists, in place.

    Returns:
        The renamed names, old → new, for a message.
    """
    renamed: dict[str, str] = {}
    for call, content, old in _calls(node):
        unlocked = flag_override(call, ["struct", "readonly"], False)
        with unlocked if OmegaConf.is_config(call) else nullcontext():
            renamed |= _renamed_call(call, content, old)
    return renamed


def complete(node: Any) -> None:
    """Add to the settings of a store or record, in place, the defaults of its release."""
    for call, content, target in _calls(node):
        for key, value in UNSAID.get(target, {}).items():
            if key not in content:
                call[key] = value


def _calls(node: Any) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """Yield every call in a configuration: the node, its content, and its target."""
    content = getattr(node, "_content", node)  # interpolations and missing values stay as they are
    children = content.values() if isinstance(content, dict) else content
    for child in list(children) if isinstance(content, dict | list) else ():
        yield from _calls(child)
    target = content.get("_target_") if isinstance(content, dict) else None
    target = getattr(target, "_val", target)
    if isinstance(target, str):
        yield node, content, target


def _renamed_call(node: Any, content: dict[str, Any], old: str) -> dict[str, str]:
    target, settings = current(old)
    renamed = {}
    for was, name in SETTINGS.get(target, {}).items():
        if was in content:
            node[name] = content.pop(was)
            renamed[f"{was} of {target}"] = name
    if target != old:
        node["_target_"] = target
        for key in settings.keys() - content.keys():
            node[key] = settings[key]
        listed = ", ".join(f"{key}={value}" for key, value in settings.items())
        renamed[old] = f"{target} with {listed}" if listed else target
    return renamed


def warn_of(renamed: dict[str, str]) -> None:
    """Warn about old names, with their current ones."""
    if renamed:
        lines = "; ".join(f"{old} is {new} now" for old, new in renamed.items())
        warnings.warn(f"names of an earlier release, which still work: {lines}.", DminWarning, 2)
