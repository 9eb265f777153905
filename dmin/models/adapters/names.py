"""The names that trainers use for layers: diffusers' own, and those of the original layouts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from diffusers.models.normalization import RMSNorm
from torch import nn
from torch.nn.modules.conv import _ConvNd

from dmin.models.adapters.layers import Adapted, Place
from dmin.runtime.errors import DminError

_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def places(network: nn.Module) -> dict[str, list[Place]]:
    """Return the layers of a network for each module name that a file may contain.

    Args:
        network: a network of diffusers or transformers, or any other.

    Returns:
        Module name, with ``_`` for each ``.``, → its layers; several if a trainer joins them.

    Raises:
        DminError: two layers have the same name.
    """
    adapted = tuple(f"{n}." for n, m in network.named_modules() if isinstance(m, Adapted))
    layers = {
        name: layer
        for name, module in network.named_modules()
        if (layer := base_of(module)) is not None and name and not name.startswith(adapted)
    }
    found: dict[str, list[Place]] = {}
    for name in layers:
        if flat(name) in found:
            raise DminError(f"model.adapter: {flat(name)} is the name of two layers.")
        found[flat(name)] = [Place(name)]
        # Newer text encoders lack this level, which names in most adapter files have.
        found.setdefault(f"text_model_{flat(name)}", [Place(name)])
    for original, own in _originals(network, list(layers)):
        parts = own.removeprefix("~").split()
        if all(part in layers for part in parts):
            found.setdefault(flat(original), _joined(parts, layers, own.startswith("~")))
    return found


def flat(name: str) -> str:
    """Return a dotted name in the form of kohya's files."""
    return name.replace(".", "_")


def base_of(module: nn.Module) -> Any:
    """Return the layer, without adapters, of a module; None if it cannot have adapters."""
    layer = module.base_layer if isinstance(module, Adapted) else module
    if isinstance(layer, _ConvNd):
        plain = not layer.transposed and layer.groups == 1 and layer.padding_mode == "zeros"
        return layer if plain else None
    if isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | RMSNorm):
        return None if layer.weight is None else layer
    return layer if isinstance(layer, nn.Linear) else None


def _joined(parts: list[str], layers: dict[str, Any], halves: bool) -> list[Place]:
    if len(parts) == 1:
        return [Place(parts[0], halves=halves)]
    start, found = 0, []
    for part in parts:
        rows = layers[part].weight.shape[0]
        found.append(Place(part, start, rows))
        start += rows
    return found


def _originals(network: Any, layers: list[str]) -> Iterator[tuple[str, str]]:
    """Yield names in the layout in which a network was published, and diffusers' names."""
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        yield from _unet(network, layers)
    known = yaml.safe_load(Path(__file__).with_name("original_names.yaml").read_text())
    for blocks, inside in known.get(kind, {}).items():
        if blocks == "outside":
            yield from inside.items()
            continue
        original, own = blocks.split()
        count = len(getattr(network, own))
        for n in range(count):
            for name, parts in inside.items():
                swap = parts.startswith("~~") and n == count - 1
                parts = " ".join(f"{own}.{n}.{part}" for part in parts.lstrip("~").split())
                yield f"{original}.{n}.{name}", f"~{parts}" if swap else parts


def _unet(network: Any, layers: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the original and diffusers' names of Stable Diffusion 1, 2 and XL."""
    yield from _UNET.items()
    for original, own in _unet_parts(network):
        for layer in layers:
            if layer == own:
                yield original, own
            elif layer.startswith(f"{own}."):
                rest = layer.removeprefix(f"{own}.")
                yield f"{original}.{_RESNET.get(rest, rest)}", layer


def _unet_parts(network: Any) -> Iterator[tuple[str, str]]:
    """Yield original and diffusers' names of residual blocks, attention and resampling."""
    number = 1
    for way, original in (("down", "input_blocks"), ("up", "output_blocks")):
        for i, block in enumerate(getattr(network, f"{way}_blocks")):
            own, attends = f"{way}_blocks.{i}", getattr(block, "attentions", None) is not None
            for j in range(len(block.resnets)):
                yield f"{original}.{number}.0", f"{own}.resnets.{j}"
                if attends:
                    yield f"{original}.{number}.1", f"{own}.attentions.{j}"
                number += 1
            if getattr(block, "downsamplers", None):
                yield f"{original}.{number}.0.op", f"{own}.downsamplers.0.conv"
                number += 1
            if getattr(block, "upsamplers", None):
                place = f"{original}.{number - 1}.{2 if attends else 1}.conv"
                yield place, f"{own}.upsamplers.0.conv"
        number = 0
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"
