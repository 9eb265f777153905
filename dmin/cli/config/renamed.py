"""What configurations and records of earlier releases name, and what it is called today."""

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

# Old → new, of what a `_target_` named in 0.1.0: a module, or a name in one. The longest wins.
TARGETS = {
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


def current_target(name: str) -> str:
    """Return what a ``_target_`` of any release is called today."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if module in TARGETS:
            return ".".join([TARGETS[module], *parts[end:]])
    return name


def rename_targets(node: Any) -> None:
    """Bring every ``_target_`` of a configuration, or of plain mappings and lists, up to date."""
    if isinstance(node, DictConfig | dict):
        for key in list(node):
            # Interpolations and missing values stay what they are.
            value = node[key] if isinstance(node, dict) else node._get_node(key)
            if key == "_target_" and isinstance(found := _text(value), str):
                if (new := current_target(found)) != found:
                    _set(node, key, new)
            else:
                rename_targets(value)
    elif isinstance(node, ListConfig):
        if not (node._is_none() or node._is_missing() or node._is_interpolation()):
            for index in range(len(node)):
                rename_targets(node._get_node(index))
    elif isinstance(node, list):
        for value in node:
            rename_targets(value)


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else getattr(value, "_value", lambda: None)()


def _set(node: Any, key: str, value: str) -> None:
    if isinstance(node, dict):
        node[key] = value
    else:
        OmegaConf.set_readonly(node, False)
        node[key] = value
