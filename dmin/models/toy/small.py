"""Small untrained pipelines of real families, which a CPU trains in minutes.

They use diffusers' and transformers' own classes and are saved and loaded like any checkpoint,
so that measurements on them use the same code as a large model.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from dmin.models.families.stable_diffusion_3 import StableDiffusion3

PIECES, TOKENS = 24, 16  # most tokens of a caption, for CLIP's and for T5's tokenizer


def stable_diffusion_3(
    words: Sequence[str],
    size: int = 16,
    patch: int = 2,
    width: int = 64,
    heads: int = 4,
    layers: int = 3,
    text: int = 32,
    shift: float = 1.0,
) -> StableDiffusion3:
    """Return a small Stable Diffusion 3 on pixels, with a VAE that is the identity.

    The transformer's weights are random and to be trained. The text encoders' weights are random
    and remain so: a fixed random embedding of each caption.

    Args:
        words: all words of the captions.
        size: height and width of the images.
        patch: height and width of a token in pixels.
        width: width of the transformer.
        heads: number of attention heads.
        layers: number of blocks.
        text: width of the text encoders.
        shift: shift of the flow's timesteps.
    """
    network = SD3Transformer2DModel(
        sample_size=size,
        patch_size=patch,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=2 * text,
        caption_projection_dim=width,
        pooled_projection_dim=2 * text,
        pos_embed_max_size=size // patch,
        qk_norm="rms_norm",
    )
    tokenizer = word_tokenizer(words)
    pipeline = StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=pixel_vae(),
        text_encoder=_clip(tokenizer, text),
        text_encoder_2=_clip(tokenizer, text),
        text_encoder_3=_t5(len(words) + 3, 2 * text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=_t5_tokenizer(words),
    )
    return StableDiffusion3(pipeline, max_sequence_length=TOKENS)


def pixel_vae() -> AutoencoderKL:
    """Return an autoencoder whose weights make the latents equal to the pixels, within 1e-3.

    The input of each group norm is the image and its negative, divided by 100, with a channel of +1
    and one of −1: its mean is zero, and its deviation hardly depends on the image. SiLU is
    nearly linear around 8. The layers in between are zero.
    """
    small, level = 0.01, 8.0
    vae = AutoencoderKL(
        block_out_channels=[8],
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=3,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        for half in (vae.encoder, vae.decoder):
            norm: Any = half.conv_norm_out
            gain = (2 / 8 + norm.eps) ** 0.5 / (small * _slope(level))
            for colour in range(3):
                half.conv_in.weight[colour, colour, 1, 1] = small
                half.conv_in.weight[3 + colour, colour, 1, 1] = -small
                half.conv_out.weight[colour, colour, 1, 1] = gain
            half.conv_in.bias[6], half.conv_in.bias[7] = 1, -1
            norm.weight[:], norm.bias[:] = 1, level
            half.conv_out.bias[:3] = -gain * _silu(level)
    return vae


def word_tokenizer(words: Sequence[str]) -> transformers.CLIPTokenizer:
    """Return a tokenizer like CLIP's with these words and all their letters."""
    letters = sorted({letter for word in words for letter in word})
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        first, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for letter in rest:
            if (first, letter) not in merges:
                merges.append((first, letter))
                pieces.append(first + letter)
            first += letter
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=PIECES)


def _clip(tokenizer: Any, width: int) -> transformers.CLIPTextModelWithProjection:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PIECES,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=width,
        initializer_factor=8.0,  # so that words differ, not only their positions
    )
    return transformers.CLIPTextModelWithProjection(config)


def _t5_tokenizer(words: Sequence[str]) -> transformers.T5TokenizerFast:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    return transformers.T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=TOKENS)


def _t5(vocabulary: int, width: int) -> transformers.T5EncoderModel:
    config = transformers.T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=16, d_ff=width, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config)


def _silu(x: float) -> float:
    return float(torch.nn.functional.silu(torch.tensor(x, dtype=torch.float64)))


def _slope(x: float) -> float:
    s = float(torch.sigmoid(torch.tensor(x, dtype=torch.float64)))
    return s * (1 + x * (1 - s))
