"""What configurations and records of earlier releases name, and what it is called today.

They enter in two ways: composed (of a user's own YAML files, overrides, or a record that is
repeated), and as the settings that a trained model keeps beside its weights.
"""

import copy
import warnings
from contextlib import nullcontext
from typing import Any

from omegaconf import OmegaConf, flag_override

from dmin.runtime.errors import DminWarning

# Old → new, of what a `_target_` named: a module, or a name in one. The longest wins. Where a class
# became settings of another: the other, and these settings.
TARGETS: dict[str, str | tuple[str, dict[str, Any]]] = {
    "dmin.attribution.DMinUnnormalised": ("dmin.attribution.DMin", {"lengths": True}),
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
        {"alpha": 1.0, "p": 1.0, "sharpness": 1.0, "effective": None, "name": "spectral_energy"},
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
SETTINGS: dict[str, dict[str, str]] = {}


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
    content = getattr(node, "_content", node)  # interpolations and missing values stay as they are
    renamed: dict[str, str] = {}
    if isinstance(content, list):
        for child in content:
            renamed |= rename(child)
    if not isinstance(content, dict):
        return renamed
    for child in content.values():
        renamed |= rename(child)
    old = content.get("_target_")
    old = getattr(old, "_val", old)
    if isinstance(old, str):
        unlocked = flag_override(node, ["struct", "readonly"], False)
        with unlocked if OmegaConf.is_config(node) else nullcontext():
            renamed |= _renamed_call(node, content, old)
    return renamed


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
