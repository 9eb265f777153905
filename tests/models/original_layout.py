"""Tiny pipelines in the layouts that single files are published in."""

import re

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Of the tiny UNet: two levels, one layer in each on the way down, two on the way up.
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",  # of SDXL
    "add_embedding.linear_2": "label_emb.0.2",
}
VAE = [
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.0\.resnets\.(\d)", r"up.1.block.\1"),
    (r"up_blocks\.1\.resnets\.(\d)", r"up.0.block.\1"),
    (r"up_blocks\.0\.upsamplers\.0", "up.1.upsample"),
]


OPEN_CLIP = [
    (r"text_model\.encoder\.layers", "transformer.resblocks"),
    (r"text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm", "ln_final"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn", "attn"),
    (r"text_projection\.weight", "text_projection"),
]
BLOCK = r"transformer_blocks\.(\d+)\."
SD3 = [
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (BLOCK + r"attn(2?)\.to_out\.0", r"joint_blocks.\1.x_block.attn\2.proj"),
    (BLOCK + r"attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (BLOCK + r"attn(2?)\.norm_(q|k)", r"joint_blocks.\1.x_block.attn\2.ln_\3"),
    (
        BLOCK + r"attn\.norm_added_(q|k)",
        r"joint_blocks.\1.context_block.attn.ln_\2",
    ),
    (BLOCK + r"norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (
        BLOCK + r"norm1_context\.linear",
        r"joint_blocks.\1.context_block.adaLN_modulation.1",
    ),
    (BLOCK + r"ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
    (BLOCK + r"ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    (
        BLOCK + r"ff_context\.net\.0\.proj",
        r"joint_blocks.\1.context_block.mlp.fc1",
    ),
    (BLOCK + r"ff_context\.net\.2", r"joint_blocks.\1.context_block.mlp.fc2"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
]


def renamed(key, patterns):
    for pattern, name in patterns:
        key = re.sub(pattern, name, key)
    return key


def unet_weights(network):
    """The UNet's, as Stable Diffusion 1.x, 2.x and XL have them."""
    state = {}
    for key, value in network.state_dict().items():
        prefix = next(p for p in UNET if key.startswith(f"{p}."))
        rest = key.removeprefix(prefix)
        if ".resnets." in prefix:
            name, end = rest[1:].rsplit(".", 1)
            rest = f".{RESNET[name]}.{end}"
        state[f"model.diffusion_model.{UNET[prefix]}{rest}"] = value
    return state


def vae_weights(vae):
    state = {}
    for key, value in vae.state_dict().items():
        key = renamed(key, VAE)
        if "attn_1" in key and value.ndim == 2:
            value = value[:, :, None, None]
        state[f"first_stage_model.{key}"] = value
    return state


def clip_weights(encoder, prefix):
    named = encoder.state_dict().items()
    return {
        f"{prefix}{k if k.startswith('text_model.') else f'text_model.{k}'}": v for k, v in named
    }


def open_clip_weights(encoder, prefix):
    """As OpenCLIP has them: query, key and value in one matrix."""
    state, weights = {}, encoder.state_dict()
    for key, value in weights.items():
        joined = re.fullmatch(r"(.*self_attn)\.([qkv])_proj\.(weight|bias)", key)
        if joined:
            parts = [weights[f"{joined[1]}.{x}_proj.{joined[3]}"] for x in "qkv"]
            state[f"{renamed(joined[1], OPEN_CLIP)}.in_proj_{joined[3]}"] = torch.cat(parts)
        else:
            state[renamed(key, OPEN_CLIP)] = value.T if key.startswith("text_proj") else value
    return {f"{prefix}{k}": v for k, v in state.items()}


def sd3_weights(network):
    """The transformer's of SD3: queries, keys and values joined, scale and shift swapped."""
    state = network.state_dict()
    last = len(network.transformer_blocks) - 1
    found = {}
    for key, value in state.items():
        block = re.fullmatch(BLOCK + r"attn(2?)\.(to_|add_)q(_proj)?\.(weight|bias)", key)
        if block:
            number, second, how, end, kind = block.groups()
            side = "x_block" if how == "to_" else "context_block"
            stem = f"transformer_blocks.{number}.attn{second}.{how}"
            parts = [state[f"{stem}{x}{end or ''}.{kind}"] for x in "qkv"]
            found[f"joint_blocks.{number}.{side}.attn{second}.qkv.{kind}"] = torch.cat(parts)
        elif not re.search(r"\.attn2?\.(to_|add_)[kv](_proj)?\.", key):
            if key.startswith(("norm_out.", f"transformer_blocks.{last}.norm1_context.")):
                value = torch.cat(value.chunk(2)[::-1])
            found[renamed(key, SD3)] = value
    return {f"model.diffusion_model.{k}": v for k, v in found.items()}


def save(state, file):
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    return file
