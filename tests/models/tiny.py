"""Real pipelines of a few thousand parameters, built from configs and saved: no network needed."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def clip_tokenizer():
    vocab = {w: i for i, w in enumerate(["<|startoftext|>", "<|endoftext|>"])}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocab[letter] = len(vocab)
        vocab[f"{letter}</w>"] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8)


def clip_config(**changes):
    settings = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "projection_dim": 16,
    }
    return CLIPTextConfig(**{**settings, **changes})


def vae(**changes):
    settings = {
        "block_out_channels": [4, 4],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "layers_per_block": 1,
    }
    return AutoencoderKL(**{**settings, **changes})


def unet(**changes):
    settings = {
        "sample_size": 8,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
    }
    return UNet2DConditionModel(**{**settings, **changes})


def stable_diffusion(prediction_type="epsilon"):
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


BUILDERS = {"stable_diffusion": stable_diffusion}


def save(family, folder, **changes):
    """Save the tiny pipeline of a family as diffusers does; return its folder."""
    torch.manual_seed(0)
    pipeline = BUILDERS[family](**changes)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            # Layers that start at zero would hide what comes before them.
            for parameter in component.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(str(folder))
    return folder
