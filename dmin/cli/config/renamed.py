"""What configurations and records of earlier releases name, and what it is called today.

They enter in two ways: composed (of a user's own YAML files, overrides, or a record that is
repeated), and as the settings that a trained model keeps beside its weights.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from omegaconf import OmegaConf, flag_override

from dmin.runtime.errors import DminWarning

# Old → new, of what a `_target_` named: a module, or a name in one. The longest wins. Where a class
# became settings of another: the other, and these settings.
TARGETS: dict[str, str | tuple[str, dict[str, Any]]] = {
    "dmin.attribution.DMinUnnormalised": ("dmin.attribution.DMin", {"keep_norms": True}),
    "dmin.attribution.DTRAK": (
        "dmin.attribution.TRAK",
        {"readout": "mean_squared_output", "name": "d_trak"},
    ),
    "dmin.attribution.DTRAKEnsemble": (
        "dmin.attribution.TRAKEnsemble",
        {"readout": "mean_squared_output", "name": "d_trak_ensemble"},
    ),
    "dmin.attribution.GAS": (
        "dmin.attribution.OverCheckpoints",
        {"method": {"_target_": "dmin.attribution.GradCos"}, "name": "gas"},
    ),
    "dmin.attribution.RelativeIF": (
        "dmin.attribution.TRAK",
        {"divisor": "change", "name": "relative_if"},
    ),
    "dmin.attribution.RenormalisedIF": (
        "dmin.attribution.TRAK",
        {"divisor": "length", "name": "renormalised_if"},
    ),
    "dmin.attribution.SpectralEnergy": (
        "dmin.attribution.SharpEnergy",
        {"alpha": 1.0, "p": 1.0, "exponent": 1.0, "effective": None, "name": "spectral_energy"},
    ),
    "dmin.attribution.TracIn": (
        "dmin.attribution.OverCheckpoints",
        {"method": {"_target_": "dmin.attribution.GradDot"}, "name": "tracin"},
    ),
    "dmin.collect.sharded": "dmin.collect.fsdp",
    "dmin.data.hf": "dmin.data.huggingface",
    "dmin.data.tars": "dmin.data.webdataset",
    "dmin.models.ddpm": "dmin.models",
    "dmin.models.dit": "dmin.models",
    "dmin.models.flux": "dmin.models",
    "dmin.models.hunyuan_dit": "dmin.models",
    "dmin.models.mlp": "dmin.models",
    "dmin.models.pixart": "dmin.models",
    "dmin.models.sana": "dmin.models",
    "dmin.models.small": "dmin.models.toy.small",
    "dmin.models.stable_diffusion": "dmin.models",
    "dmin.models.stable_diffusion_3": "dmin.models",
    "dmin.models.stable_diffusion_xl": "dmin.models",
    "dmin.noise": "dmin.diffusion",
    "dmin.timesteps": "dmin.diffusion",
}
# Target of today → its settings, old → new.
SETTINGS: dict[str, dict[str, str]] = {
    "dmin.attribution.DMin": {"lengths": "keep_norms"},
    "dmin.attribution.SharpEnergy": {"lengths": "length_weight", "sharpness": "exponent"},
    "dmin.queries.Generated": {"journey": "trajectory"},
}
# Results of the doctor, old → new: as `repeat` compares them.
CHECKS = {"timesteps tell examples apart": "timesteps distinguish examples"}
# Target of today → settings that it had not yet, with what was done then.
UNSAID: dict[str, dict[str, Any]] = {"dmin.data.image_folder.ImageFolder": {"layout": "plain"}}


def current(name: str) -> tuple[str, dict[str, Any]]:
    """Return what a ``_target_`` of any release is called today, and settings that go with it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        found = TARGETS.get(".".join(parts[:end]))
        if found is not None:
            new, settings = (found, {}) if isinstance(found, str) else found
            return ".".join([new, *parts[end:]]), settings
    return name, {}


def rename(node: Any) -> dict[str, str]:
    """Bring every call in a configuration, or in plain mappings and lists, up to date in place.

    Returns:
        What was renamed: old → new, spelled for a message.
    """
    renamed: dict[str, str] = {}
    for call, content, old in _calls(node):
        unlocked = flag_override(call, ["struct", "readonly"], False)
        with unlocked if OmegaConf.is_config(call) else nullcontext():
            renamed |= _renamed_call(call, content, old)
    return renamed


def complete(node: Any) -> None:
    """Say in the settings of a store or a record, in place, what was done unsaid then."""
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
            node[key] = copy.deepcopy(settings[key])
        listed = ", ".join(f"{key}={value}" for key, value in settings.items())
        renamed[old] = f"{target} with {listed}" if listed else target
    return renamed


def warn_of(renamed: dict[str, str]) -> None:
    """Say what old names are called today."""
    if renamed:
        lines = "; ".join(f"{old} is {new} now" for old, new in renamed.items())
        warnings.warn(f"names of an earlier release, which still work: {lines}.", DminWarning, 2)
