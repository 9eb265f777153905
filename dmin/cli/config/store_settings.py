"""The settings that a store was collected with, saved in it, so that later commands need only it.

``STORE/settings.yaml`` is not part of the store's contents: every command compares it with the
manifest, and like all settings from elsewhere it may only name trusted targets (``trust``).
"""

import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from dmin.cli.config.annotations import parameters
from dmin.cli.config.environment import kept
from dmin.cli.config.subtrees import select
from dmin.cli.config.targets import load
from dmin.cli.config.trust import demands, read_settings
from dmin.runtime.errors import DminError, DminWarning
from dmin.runtime.files import commit, os_failure

FILE = "settings.yaml"
FORMAT = 1
GROUPS = ("model", "data", "sketch", "timesteps", "noise")
# What features depend on, and what made a pass fit into memory.
_COLLECT = (
    *("readouts", "params", "groups", "block_size", "dtype"),
    *("microbatch", "gradient_checkpointing", "limit"),
)
_HEAD = (
    "# What `dmin <command> STORE` composes. The settings listed as `paths` start at this folder.\n"
)


def keep(cfg: DictConfig, store: Path) -> None:
    """Write the settings of a collection into its store.

    Args:
        cfg: composed and validated.
        store: the folder, which has its manifest.

    If the folder of a complete store is read-only, it only warns.
    """
    settings, _ = kept(cfg)
    parts = {name: settings[name] for name in ("name", "seed", *GROUPS)}
    collect = {name: settings["collect"][name] for name in _COLLECT if name in cfg.collect}
    paths = []
    for place, value in _paths(parts):
        there = Path(value).expanduser()
        if there.exists():  # else the name of a model elsewhere
            _set(parts, place, _way(store, there))
            paths.append(place)
    _write(store, {"format": FORMAT, "paths": paths, **parts, "collect": collect})


def _write(store: Path, settings: dict[str, Any]) -> None:
    file, text = store / FILE, f"{_HEAD}{OmegaConf.to_yaml(settings)}".encode()
    try:
        if not file.is_file() or file.read_bytes() != text:
            commit(file, text)
    except OSError as error:
        reason = f"{os_failure('keep the settings in', store, error)} Without them, later commands "
        reason += "need model=… and data=…"
        warnings.warn(reason, DminWarning, stacklevel=2)


def follow(source: Path, target: Path, changes: Mapping[str, Any] | None = None) -> None:
    """Copy the settings of a store to one derived from it, if there are any.

    Args:
        source: the original store.
        target: the new store.
        changes: dotted settings that differ in it.
    """
    if not (source / FILE).is_file() or (target / FILE).is_file():
        return
    settings = _plain(source)
    for place, value in (changes or {}).items():
        _set(settings, place, value)
    for place in settings["paths"]:
        _set(settings, place, _way(target, source / select(settings, place)))
    _write(target, settings)


def read(store: Path, command: str, chosen: Collection[str], trust: bool) -> dict[str, Any]:
    """Return the settings of a store, with paths relative to the current folder.

    Args:
        store: the folder.
        command: that they are for.
        chosen: groups and dotted settings given by the user, which are left out.
        trust: whether they may name any target.

    Raises:
        DminError: there are none, they are not in the form that `keep` writes, or
            they need trust.
    """
    if not (store / FILE).is_file():
        if {"model", "data"} <= set(chosen):
            return {}
        raise DminError(
            f"{store} keeps no settings ({FILE}): it was collected in Python, or by an earlier "
            f"release. Give model=… and data=… as before, or save them in the store by running "
            f"`dmin collect {store}` with the original settings, which computes nothing again."
        )
    settings = _plain(store)
    for group in GROUPS:
        if group in chosen:
            settings.pop(group, None)
    asks = [] if trust else demands(OmegaConf.create(settings), command, store, chosen)
    if asks:
        raise DminError(
            f"{store / FILE} names targets that dmin's own settings do not, which could run "
            f"arbitrary code: {'; '.join(asks)}. If you trust the source of the store, add "
            f"--trust. Or override them, for example with model=…"
        )
    for place in settings.pop("paths"):
        kept = select(settings, place)
        if kept is not None and place not in chosen:
            there = store / str(kept)
            if not there.exists():
                raise DminError(_moved(store, place, there))
            _set(settings, place, _way(Path.cwd(), there))
    del settings["format"]
    return settings


def _moved(store: Path, setting: str, there: Path) -> str:
    say = "--model PATH" if setting == "model.path" else f"{setting}=PATH"
    return (
        f"{store} was collected with {setting} at {os.path.normpath(there)}, which no longer "
        f"exists. Give its new location: {say} (its content is checked against the store)."
    )


def _plain(store: Path) -> dict[str, Any]:
    """Read the file of a store, if it is in the form that `keep` writes."""
    file = store / FILE
    found: Any = OmegaConf.to_container(read_settings(file))
    if found.get("format") != FORMAT:
        raise DminError(
            f"{file} has format {found.get('format')!r}, but this dmin reads format {FORMAT}. "
            "Remove it and give model=… and data=… on the command line."
        )
    known = {"format": int, "paths": list, "name": str, "seed": int, "collect": dict}
    known |= dict.fromkeys(GROUPS, dict)
    odd = [key for key, kind in known.items() if not isinstance(found.get(key), kind)]
    odd += [str(key) for key in found if key not in known]
    if not odd:
        odd += [f"collect.{key}" for key in found["collect"] if key not in _COLLECT]
        paths = map(str, found["paths"])
        odd += [path for path in paths if not isinstance(select(found, path), str)]
    if odd:
        raise DminError(
            f"{file} does not have a valid {odd[0]}. Remove the file and give model=… and data=… "
            "on the command line."
        )
    return dict(found)


def _paths(settings: dict[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """Yield the arguments of calls among settings that are paths, and their values."""
    for name, call in settings.items():
        if not isinstance(call, dict):
            continue
        here = f"{place}.{name}".lstrip(".")
        taken = parameters(load(call["_target_"], here)) or [] if "_target_" in call else []
        for each in taken:
            is_path = each.annotation is Path or Path in get_args(each.annotation)
            if is_path and isinstance(call.get(each.name), str):
                yield f"{here}.{each.name}", call[each.name]
        yield from _paths(call, here)


def _set(settings: dict[str, Any], place: str, value: Any) -> None:
    *sections, key = place.split(".")
    for section in sections:
        settings = settings[section]
    settings[key] = value


def _way(start: Path, end: Path) -> str:
    """Return the relative path from one folder to another; the absolute one if impossible."""
    try:
        return Path(os.path.relpath(end.resolve(), start.resolve())).as_posix()
    except ValueError:  # on another drive
        return end.resolve().as_posix()
