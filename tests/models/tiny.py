"""Real pipelines of a few thousand parameters, built from configs and saved: no network needed."""

import string

import diffusers
import torch
import transformers

LETTERS = list(string.ascii_lowercase)


def clip_tokenizer():
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{x}</w>" for x in LETTERS)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=8)


def clip(kind=transformers.CLIPTextModel, **changes):
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
    return kind(transformers.CLIPTextConfig(**{**settings, **changes}))


def t5_tokenizer():
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    vocab = [(piece, -float(index)) for index, piece in enumerate(pieces)]
    return transformers.T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=12)


def t5(width=16):
    config = transformers.T5Config(
        vocab_size=40, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config)


def vae(stages=2, **changes):
    settings = {
        "block_out_channels": [4] * stages,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "layers_per_block": 1,
    }
    return diffusers.AutoencoderKL(**{**settings, **changes})


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
    return diffusers.UNet2DConditionModel(**{**settings, **changes})


def ddim(prediction_type, beta_schedule="scaled_linear"):
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule=beta_schedule,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def stable_diffusion(prediction_type="epsilon"):
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=ddim(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def told_of_sizes(numbers=6, **changes):
    return unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=numbers * 8 + 16,
        **changes,
    )


def stable_diffusion_xl_refiner(prediction_type="epsilon"):
    encoder = clip(transformers.CLIPTextModelWithProjection, hidden_size=32)
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=encoder,
        tokenizer=None,
        tokenizer_2=clip_tokenizer(),
        unet=told_of_sizes(5),
        scheduler=ddim(prediction_type),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def stable_diffusion_xl(prediction_type="epsilon"):
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=told_of_sizes(),
        scheduler=ddim(prediction_type),
        add_watermarker=False,
    )


def stable_diffusion_3():
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        qk_norm="rms_norm",  # as SD 3.5
        dual_attention_layers=(0,),
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip(transformers.CLIPTextModelWithProjection),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection),
        text_encoder_3=t5(32),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
    )


def flux(guidance_embeds=True):
    network = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )
    return diffusers.FluxPipeline(
        transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
    )


def dit(prediction_type="epsilon"):
    network = diffusers.DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        norm_num_groups=4,
    )
    return diffusers.DiTPipeline(
        transformer=network, vae=vae(), scheduler=ddim(prediction_type, "linear")
    )


def pixart(prediction_type="epsilon", sample_size=8):
    network = diffusers.PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=3,
        cross_attention_dim=12,
        caption_channels=16,
        norm_num_groups=4,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.0001, beta_end=0.02, prediction_type=prediction_type
    )
    return diffusers.PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae(),
        transformer=network,
        scheduler=scheduler,
    )


def sana():
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    config = transformers.Gemma2Config(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=8,
        head_dim=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
    )
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
    )
    network = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=16,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(
        tokenizer=transformers.GemmaTokenizer(vocab=vocab, merges=[]),
        text_encoder=transformers.Gemma2Model(config),
        vae=autoencoder,
        transformer=network,
        scheduler=scheduler,
    )


def hunyuan_dit(prediction_type="v_prediction"):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "red", "a", "blue"]
    bert = transformers.BertConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=80,
    )
    network = diffusers.HunyuanDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        hidden_size=16,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        activation_fn="gelu-approximate",
    )
    return diffusers.HunyuanDiTPipeline(
        vae=vae(stages=4),
        text_encoder=transformers.BertModel(bert),
        tokenizer=transformers.BertTokenizer(vocab={x: i for i, x in enumerate(pieces)}),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=network,
        scheduler=diffusers.DDPMScheduler(prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


BUILDERS = {
    build.__name__: build
    for build in (
        stable_diffusion,
        stable_diffusion_xl,
        stable_diffusion_xl_refiner,
        stable_diffusion_3,
        flux,
        dit,
        pixart,
        sana,
        hunyuan_dit,
    )
}


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
