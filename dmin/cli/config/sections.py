"""The sections of a configuration without a ``_target_``: their settings, types and defaults."""

from functools import cache
from inspect import Parameter
from typing import Any, Literal

import yaml

from dmin.cli.config.groups import config_directory

# What a default does not tell; any other setting takes what its default is.
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("model", "data", "queries", "sketch", "timesteps", "noise"), dict | None),
    **dict.fromkeys(("method", "index", "train", "benchmark", "trainer", "logger"), dict | None),
    **{"name": str | None, "tags": list[str] | None, "extras.threads": int | None},
    **{"collect.path": str | None, "collect.groups": str | dict | None},
    **{"collect.limit": int | None},
    **{"collect.microbatch": int | Literal["auto"], "collect.readouts": list[str]},
    **{"collect.memory": int | None, "collect.budget": int | None},
    **{"collect.kernels": Literal["auto", "triton", "torch"], "collect.encodings": str | None},
    **{"retrieve.rows": int | None, "retrieve.min_score": float | None},
    **{"retrieve.where": dict | None, "retrieve.group_by": str | None},
    **{"retrieve.beside": list[str], "retrieve.timesteps": list[float] | None},
}


@cache
def _defaults() -> dict[str, Any]:
    """Return the settings of ``conf/dmin.yaml`` and of its default ``shard``."""
    files = {name: config_directory() / name for name in ("dmin.yaml", "shard/one.yaml")}
    root, shard = (yaml.safe_load(file.read_text("utf-8")) for file in files.values())
    return {key: each for key, each in root.items() if key not in ("defaults", "hydra")} | {
        "shard": shard
    }


def settings(section: str = "") -> list[Parameter]:
    """Return the settings of a section, or of the root, as parameters; None for a call."""
    groups: dict[str, Any] = dict.fromkeys(key for key in _TYPES if "." not in key)
    found = _defaults().get(section) if section else groups | _defaults()
    if not isinstance(found, dict):
        return []
    prefix = f"{section}." if section else ""
    return [
        Parameter(key, Parameter.KEYWORD_ONLY, default=each, annotation=_type(prefix + key, each))
        for key, each in found.items()
    ]


def _type(name: str, default: Any) -> Any:
    return _TYPES.get(name) or (dict | None if isinstance(default, dict) else type(default))
