"""Adapters in a network: described, saved and removed."""

import copy
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from dmin.models.adapters.layers import Adapted
from dmin.models.adapters.reading import AdapterFile
from dmin.models.adapters.words import WithWords


@dataclass
class Loaded:
    """An adapter in a network: its file, and the kinds and scales of its modules."""

    file: AdapterFile
    scales: dict[str, tuple[str, int | None, float]]  # layer -> kind, rank, scale


def adapters_of(network: Any) -> dict[str, Loaded]:
    """Return the adapters that were loaded into a network, by name."""
    found: dict[str, Loaded] = getattr(network, "dmin_adapters", {})
    return found


def describe_adapters(network: nn.Module) -> dict[str, Any]:
    """Return kind, rank and scale of a network's adapters; the scale changes gradients."""
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    configs = getattr(network, "peft_config", {})
    found = {
        name: {key: getattr(config, key, None) for key in names} for name, config in configs.items()
    }
    return {**found, **{name: _described(one) for name, one in adapters_of(network).items()}}


def _described(loaded: Loaded) -> dict[str, Any]:
    """Return an adapter's ranks and scales, with the names of peft's LoRA config."""
    common, _ = Counter(loaded.scales.values()).most_common(1)[0]
    others = {path: told for path, told in loaded.scales.items() if told != common}

    def alpha(told: tuple[str, int | None, float]) -> float:
        whole = told[2] * (told[1] or 1)
        return int(whole) if whole == int(whole) else whole

    kinds = sorted({told[0] for told in loaded.scales.values()})
    return {
        "r": common[1],
        "lora_alpha": alpha(common),
        "rank_pattern": {p: told[1] for p, told in others.items() if told[1] != common[1]},
        "alpha_pattern": {p: alpha(t) for p, t in others.items() if alpha(t) != alpha(common)},
        "use_rslora": False,
        **({} if kinds == ["LoRA"] else {"kinds": kinds}),
    }


def is_adapted(network: nn.Module) -> bool:
    """Return whether a network has loaded adapters or learned words."""
    return any(isinstance(module, Adapted | WithWords) for module in network.modules())


def save_adapters(network: nn.Module, folder: Path) -> None:
    """Save the adapters of a network unchanged, each in a folder with its name."""
    for name, loaded in adapters_of(network).items():
        file, own = loaded.file, folder / name
        own.mkdir(parents=True, exist_ok=True)
        save_file(file.state, own / file.path.name, metadata=file.header)
        if file.config:
            (own / "adapter_config.json").write_text(json.dumps(file.config))


def without_adapters(network: Any) -> Any:
    """Return a copy of a network without its adapters; the network itself if it has none.

    Args:
        network: the network, which is not changed.
    """
    if getattr(network, "peft_config", None):
        from diffusers.utils.peft_utils import recurse_remove_peft_layers

        plain = copy.deepcopy(network)
        recurse_remove_peft_layers(plain)
        del plain.peft_config
        plain._hf_peft_config_loaded = False
        return plain
    if not is_adapted(network):
        return network
    plain = copy.deepcopy(network)
    for path, layer in list(plain.named_modules()):
        if isinstance(layer, Adapted):
            above, _, last = path.rpartition(".")
            setattr(plain.get_submodule(above), last, layer.base_layer)
        elif isinstance(layer, WithWords):  # T5 uses it in two places
            plain.set_input_embeddings(layer.base_layer)
    plain.__dict__.pop("dmin_adapters", None)
    return plain
