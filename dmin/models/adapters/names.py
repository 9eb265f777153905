"""What trainers call the layers of a network: its own names, and those of the original layouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from dmin.models.adapters.layers import Adapted, Place
from dmin.runtime.errors import DminError

_QKV, _ADDED = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
# Original name → layers of ours, joined in this order; ~: the halves of its rows are swapped.
_FLUX_DOUBLE = {
    "img_attn.qkv": _QKV,
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.qkv": _ADDED,
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
_FLUX_SINGLE = {
    "linear1": f"{_QKV} proj_mlp",
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}
_FLUX = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
}
_SD3_JOINT = {
    "x_block.attn.qkv": _QKV,
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": _QKV.replace("attn.", "attn2."),
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.qkv": _ADDED,
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}
_SD3 = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
}
# Class of the network → (name of its blocks, ours, what is in one), and names outside of blocks.
_TRANSFORMERS: dict[str, tuple[list[tuple[str, str, dict[str, str]]], dict[str, str]]] = {
    "FluxTransformer2DModel": (
        [
            ("double_blocks", "transformer_blocks", _FLUX_DOUBLE),
            ("single_blocks", "single_transformer_blocks", _FLUX_SINGLE),
        ],
        _FLUX,
    ),
    "SD3Transformer2DModel": ([("joint_blocks", "transformer_blocks", _SD3_JOINT)], _SD3),
}
_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def places(network: nn.Module) -> dict[str, list[Place]]:
    """Return where each module that a file may name stands in a network.

    Args:
        network: of diffusers or transformers, or any other.

    Returns:
        name, with ``_`` for each ``.``, → the layers it is of: several where a trainer joins them.

    Raises:
        DminError: two layers have one name.
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
        # Text encoders have lost a level of their names since most adapters were trained.
        found.setdefault(f"text_model_{flat(name)}", [Place(name)])
    for original, own in _originals(network, list(layers)):
        parts = [part.removeprefix("~") for part in own.split()]
        if all(part in layers for part in parts):
            found.setdefault(flat(original), _joined(parts, layers, own.startswith("~")))
    return found


def flat(name: str) -> str:
    """Return a dotted name as kohya's files have it."""
    return name.replace(".", "_")


def base_of(module: nn.Module) -> Any:
    """Return the layer that an adapter of a module is of; None where adapters are made for none."""
    layer = module.base_layer if isinstance(module, Adapted) else module
    if isinstance(layer, _ConvNd):
        plain = not layer.transposed and layer.groups == 1 and layer.padding_mode == "zeros"
        return layer if plain else None
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
    """Yield the names of the layout that a network was published in, and ours."""
    kind = type(network).__name__
    if kind == "UNet2DConditionModel":
        yield from _unet(network, layers)
    if kind not in _TRANSFORMERS:
        return
    blocks, outside = _TRANSFORMERS[kind]
    yield from outside.items()
    for original, own, inside in blocks:
        count = len(getattr(network, own))
        for n in range(count):
            for name, parts in inside.items():
                # The last block of SD3 tells its context shift and scale in the other order.
                swap = name.startswith("context_block.adaLN") and n == count - 1
                places = " ".join(f"{'~' if swap else ''}{own}.{n}.{p}" for p in parts.split())
                yield f"{original}.{n}.{name}", places


def _unet(network: Any, layers: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the names of Stable Diffusion 1, 2 and XL."""
    yield from _UNET.items()
    for original, own in _unet_parts(network):
        for layer in layers:
            if layer == own:
                yield original, own
            elif layer.startswith(f"{own}."):
                rest = layer.removeprefix(f"{own}.")
                yield f"{original}.{_RESNET.get(rest, rest)}", layer


def _unet_parts(network: Any) -> Iterator[tuple[str, str]]:
    """Yield where residual blocks, attention and changes of size stand: original place, ours."""
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
