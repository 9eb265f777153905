"""Which targets and values settings from elsewhere, such as a record, may have without ``--trust``.

Targets must be among those of the shipped YAML files (or of earlier releases, see ``renamed``).
They are compared after resolution, so that no detour such as ``dmin.capture.torch.load`` passes.
For classes of other libraries, only arguments that these files set are allowed. Interpolations are
refused, as they could read the environment. Output paths must be below the current folder, or below
that of the settings.
"""

import functools
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmin.cli.config.groups import config_directory
from dmin.cli.config.renamed import complete, current
from dmin.cli.config.targets import load
from dmin.runtime.errors import DminError
from dmin.runtime.escape import printable
from dmin.runtime.files import read_regular

MOST_BYTES = 1 << 20  # of a record's settings, which take some 5 KB
_CALL = {"_target_", "_partial_", "_convert_"}  # beside the arguments; positional ones have no name
_NAMES = ("name", "logger.name", "logger.version")  # parts of the paths that are written
_WRITTEN = ("paths.outputs", "collect.path", "collect.encodings")


@functools.cache
def shipped() -> dict[str, set[str]]:
    """Return every ``_target_`` of the shipped YAML files, and the arguments they set of it.

    Those of Hydra itself are left out: launchers run what their settings name.
    """
    found: dict[str, set[str]] = {}
    groups = (path for path in config_directory().iterdir() if path.is_dir())
    for folder in sorted(path for path in groups if path.name != "hydra"):
        nodes = [yaml.safe_load(file.read_text("utf-8")) for file in sorted(folder.glob("*.yaml"))]
        calls = [call for node in nodes for _, call in _calls(node)]
        for call in calls:
            found.setdefault(call["_target_"], set()).update(call)
        # The files of a group add settings to each other's.
        together = {key for node in nodes for key in node}
        for name in {node["_target_"] for node in nodes if "_target_" in node}:
            found[name] |= together
    return found


def read_settings(file: Path) -> Any:
    """Read a record's settings as plain YAML, without composing.

    Raises:
        DminError: the file is unreadable or holds more than settings: tags, aliases, a ``hydra`` or
            ``defaults`` section.
    """
    try:
        text = read_regular(file, MOST_BYTES).decode()
        events = list(yaml.parse(text, yaml.SafeLoader))
        settings = OmegaConf.create(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise DminError(
            f"{file} cannot be read as settings ({' '.join(str(error).split())[:200]}). Remove "
            f"it, or give another folder."
        ) from error
    odd = [str(each.tag) for each in events if getattr(each, "tag", None)]
    odd += ["an alias" for each in events if isinstance(each, yaml.AliasEvent)]
    if not OmegaConf.is_dict(settings):
        odd.append("no mapping")
    else:
        odd += [f"{key}:" for key in ("hydra", "defaults") if key in settings]
    if odd:
        raise DminError(
            f"{file} holds {odd[0]}, which dmin never writes there and does not accept, as it "
            f"could change how and where code runs. Remove it, or give such settings on the "
            f"command line."
        )
    complete(settings)
    return settings


def demands(settings: Any, command: str, folder: Path, given: Collection[str] = ()) -> list[str]:
    """Return what settings need beyond what is always allowed, one line for each.

    Args:
        settings: of a record, as `read_settings` returns them.
        command: that reads them.
        folder: of the record.
        given: dotted keys that the user sets, which override the record's.
    """
    plain = OmegaConf.to_container(settings)
    found = {
        f"{place}._target_": told
        for place, call in _calls(plain)
        if (told := _of_call(call)) is not None
    }
    found |= {
        place: f"reads {value}"
        for place, value in _leaves(plain)
        if isinstance(value, str) and "${" in value
    }
    values = dict(_leaves(plain))
    for place in _NAMES:
        if any(part in str(values.get(place) or "") for part in ("/", "\\", "..")):
            found[place] = f"writes to {values[place]}"
    here, outputs = Path.cwd().resolve(), _resolved(values.get("paths.outputs") or "outputs")
    own = [here, outputs] if folder.resolve().is_relative_to(outputs) else [here]
    for place in (*_WRITTEN, *(["model.path"] if command in ("train", "demo") else [])):
        value = values.get(place)
        if value and not any(_resolved(value).is_relative_to(each) for each in own):
            found.setdefault(place, f"writes to {value}")
    return [printable(f"{place}: {told}") for place, told in found.items() if place not in given]


def _of_call(call: Mapping[str, Any]) -> str | None:
    """Describe what is not allowed in a call; None if it is as in the shipped files."""
    asked = call["_target_"]
    if not isinstance(asked, str) or (name := _listed(asked)) is None:
        return f"builds {asked}, which dmin's own settings never build"
    if name.startswith("dmin."):
        return None
    more = [str(key) for key in call if key not in shipped()[name] | _CALL]
    return (f"builds {asked} with {', '.join(more)}, which dmin's own never set") if more else None


def _listed(asked: str) -> str | None:
    """Return the listed name of the object that a name resolves to, or None."""
    name, names = current(asked)[0], shipped()
    if name in names:
        return name
    found = _found(name)
    alike = [each for each in names if each.rpartition(".")[2] == name.rpartition(".")[2]]
    same = (each for each in alike if found is not None)
    return next((each for each in same if _identity(load(each, each)) == _identity(found)), None)


def _identity(found: Any) -> list[tuple[Any, Any]]:
    """Return module and qualified name; for a class method also those of its class."""
    owner = getattr(found, "__self__", None)
    parts = [found, owner] if isinstance(owner, type) else [found]
    return [(getattr(p, "__module__", ""), getattr(p, "__qualname__", "")) for p in parts]


def _found(name: str) -> Any:
    """Resolve a name, importing only dmin's modules and listed ones."""
    parts = name.split(".")
    allowed = {each.rpartition(".")[0] for each in shipped()}
    roots = {each.partition(".")[0] for each in allowed}
    if parts[0] not in roots or any(part.startswith("_") or not part for part in parts):
        return None
    found: Any = None
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        inside = isinstance(found, ModuleType) and found.__name__.partition(".")[0] in roots
        if isinstance(found, ModuleType) and not inside:
            return None  # torch in dmin.capture.torch.load
        following = getattr(found, parts[end - 1], None)
        if following is None and (path in allowed or parts[0] == "dmin" or path in sys.modules):
            try:
                following = import_module(path)
            except Exception:  # no such module, or one that cannot be imported here
                return None
        if (found := following) is None:
            return None
    return found


def _calls(node: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every mapping with a ``_target_``, at any depth, with its dotted key."""
    if isinstance(node, dict) and "_target_" in node:
        yield place, node
    for inner, child in _children(node, place):
        yield from _calls(child, inner)


def _leaves(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key and every leaf value, with its dotted key."""
    if isinstance(node, dict):
        yield from ((f"{place}.<key>", key) for key in node if isinstance(key, str) and "$" in key)
    if not isinstance(node, dict | list):
        yield place, node
    for inner, child in _children(node, place):
        yield from _leaves(child, inner)


def _children(node: Any, place: str) -> Iterator[tuple[str, Any]]:
    listed = enumerate(node if isinstance(node, list) else ())
    items = node.items() if isinstance(node, dict) else listed
    return ((f"{place}.{key}".lstrip("."), child) for key, child in items)


def _resolved(path: Any) -> Path:
    return Path(str(path)).expanduser().resolve()
