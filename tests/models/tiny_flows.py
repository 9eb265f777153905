"""Tiny pipelines of flows that language models tell their captions; built as in `models.tiny`."""

import diffusers
import torch
import transformers
from models.tiny import BUILDERS, t5, t5_tokenizer, vae
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

TEXT = "a cat dog red blue photo 0 1 2 user system assistant , : ."
WORDS = [*TEXT.split(), "\n"]
SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.content is string else m.content[0].text }}<|im_end|>\n{% endfor %}"
)


def words(*more, **settings):
    """A tokenizer of whole words, which counts a template's tokens as those of the models do."""
    vocab = {piece: index for index, piece in enumerate([*SPECIAL, *WORDS, *more])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", True)
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[*SPECIAL[2:], *more],
        **settings,
    )
    found.chat_template = CHAT
    return found


def language_model(config, layers=2, **changes):
    settings = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        **changes,
    }
    return config(**settings)


def flow(**settings):
    return diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **settings})


def chroma():
    network = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=network,
    )


def qwen_image():
    network = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    text = language_model(
        dict,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
    )
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, 0.0, -0.2, 0.3],
        latents_std=[1.0, 0.5, 2.0, 1.5],
    )
    return diffusers.QwenImagePipeline(
        scheduler=flow(use_dynamic_shifting=True),
        vae=autoencoder,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=words(),
        transformer=network,
    )


def z_image():
    network = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for name in ("x_pad_token", "cap_pad_token"):  # which are made of memory as it was
        torch.nn.init.normal_(getattr(network, name), std=0.1)
    return diffusers.ZImagePipeline(
        scheduler=flow(),
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=transformers.Qwen3Model(language_model(transformers.Qwen3Config)),
        tokenizer=words(),
        transformer=network,
    )


def lumina_2():
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[64, 16, 16],
        cap_feat_dim=16,
    )
    return diffusers.Lumina2Pipeline(
        transformer=network,
        scheduler=flow(),
        vae=vae(stages=4, shift_factor=0.1, scaling_factor=0.4),
        text_encoder=transformers.Gemma2Model(language_model(transformers.Gemma2Config)),
        tokenizer=words(),
    )


def flux_2(guidance_embeds=True):
    network = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )
    autoencoder = diffusers.AutoencoderKLFlux2(
        block_out_channels=[4, 4],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=2,
        latent_channels=4,
        layers_per_block=1,
    )
    shared = {"scheduler": flow(), "vae": autoencoder, "transformer": network}
    if not guidance_embeds:
        config = language_model(transformers.Qwen3Config, layers=28)
        text = {"text_encoder": transformers.Qwen3ForCausalLM(config), "tokenizer": words()}
        return diffusers.Flux2KleinPipeline(**shared, **text)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **language_model(dict, layers=31)},
        vision_config={"model_type": "pixtral", **vision},
    )
    return diffusers.Flux2Pipeline(
        **shared,
        text_encoder=transformers.Mistral3ForConditionalGeneration(config),
        tokenizer=words(padding_side="left"),
    )


def wan(boundary_ratio=None):
    networks = [
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
        )
        for _ in range(1 if boundary_ratio is None else 2)
    ]
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.0, -0.2, 0.3],
        latents_std=[1.0, 0.5, 2.0, 1.5],
    )
    encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2
        )
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=encoder,
        vae=autoencoder,
        scheduler=scheduler,
        transformer=networks[0],
        transformer_2=networks[1] if networks[1:] else None,
        boundary_ratio=boundary_ratio,
    )


def wan_2_2():
    return wan(boundary_ratio=0.6)


BUILDERS.update({f.__name__: f for f in (chroma, qwen_image, z_image, lumina_2, flux_2, wan)})
BUILDERS.update(wan_clips=wan, wan_2_2=wan_2_2)
