"""Settings as they are recorded and shown: resolved, except for values from the environment."""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from dmin.cli.config.groups import config_directory

LEAST = 4  # letters of a value that is looked for in other texts


@functools.cache
def shown_names() -> frozenset[str]:
    """Return the variables that shipped YAML files read; SLURM's numbers are not secret."""
    texts = (file.read_text("utf-8") for file in config_directory().rglob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(r"\$\{oc\.env:(\w+)", text))


def kept(settings: Any) -> tuple[Any, dict[str, str]]:
    """Return settings as plain values, and the environment variables left unresolved.

    Args:
        settings: a configuration, or a part of one.

    Raises:
        OmegaConfBaseException: another interpolation cannot be resolved.
    """
    read: dict[str, str] = {}
    with _hidden(read):
        return _plain(settings, read), read


def without_values(found: Any, read: Mapping[str, str]) -> Any:
    """Remove the values of some variables from the texts of JSON values."""
    if isinstance(found, dict):
        return {key: without_values(value, read) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [without_values(value, read) for value in found]
    if not isinstance(found, str):
        return found
    for name, value in read.items():
        if len(value) >= LEAST:
            found = found.replace(value, f"${{oc.env:{name}}}")
    return found


@contextmanager
def _hidden(read: dict[str, str]) -> Iterator[None]:
    """Leave interpolations of environment variables unresolved, and record their names."""

    def env(name: str, *default: Any) -> Any:
        if name in shown_names():
            return oc.env(name, *default)
        read[name] = os.environ.get(name, "")
        raise LookupError(name)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _plain(node: Any, read: dict[str, str]) -> Any:
    if isinstance(node, DictConfig):
        return {key: _child(node, key, read) for key in node}
    if isinstance(node, ListConfig):
        return [_child(node, number, read) for number in range(len(node))]
    return node


def _child(node: Any, key: Any, read: dict[str, str]) -> Any:
    if OmegaConf.is_missing(node, key):
        return "???"
    before = dict(read)
    read.clear()
    try:
        return _plain(node[key], read)
    except OmegaConfBaseException:
        if not read:
            raise
        return OmegaConf.to_container(node)[key]  # type: ignore[index]
    finally:
        read.update(before)
