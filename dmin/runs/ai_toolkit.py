"""ai-toolkit: one YAML or JSON of a job, with its data sets in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmin.runs import adapter
from dmin.runs import wording as say
from dmin.runs.base_model import FLOWS, base_model, family_of
from dmin.runs.files import Places
from dmin.runs.folders import add, bucket, folder, masks, together
from dmin.runs.keys import Keys, Setting, Table
from dmin.runs.training_run import TrainingRun
from dmin.runtime.errors import DminError

# Architecture → family.
FAMILIES = {
    "sd1": "stable_diffusion",
    "sd2": "stable_diffusion",
    "sdxl": "stable_diffusion_xl",
    "ssd": "stable_diffusion_xl",
    "vega": "stable_diffusion_xl",
    "sd3": "stable_diffusion_3",
    "pixart": "pixart",
    "pixart_sigma": "pixart",
    "flux": "flux",
}
OLDER = {"v2": "sd2", "v3": "sd3", "xl": "sdxl"}  # as in ``is_xl``
CONFIGS = ("*.yaml", "*.yml", "*.json")
PROCESSES = ("sd_trainer", "ui_trainer", "diffusion_trainer")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ONE = (1, "1", "1.0")
TOP = Table(
    other={say.LEARNED: "embedding decorator", say.TERMS: "adapter slider guidance"},
    inert="type training_folder device performance_log_every sqlite_db_path log_dir logging meta "
    "save sample trigger_word",
)
TRAIN = Table(
    settings={
        "noise_offset": Setting("noise_offset"),
        "min_snr_gamma": Setting("snr_gamma"),
        "cfg_scale": Setting("embedded_guidance", 1.0, off=None),
    },
    other={
        say.BOUNDED: "loss_type",
        say.WEIGHTS: "snr_gamma linear_timesteps linear_timesteps2",
        say.CUT_OFF: "min_denoising_steps",
        say.NOISE: "match_noise_norm dynamic_noise_offset blended_blur_noise random_noise_shift "
        "noise_multiplier random_noise_multiplier force_consistent_noise img_multiplier "
        "optimal_noise_pairing_samples noisy_latent_multiplier latent_multiplier",
        say.TERMS: "loss_target inverted_mask_prior diff_output_preservation do_guidance_loss "
        "blank_prompt_preservation do_differential_guidance do_prior_divergence do_cfg train_turbo "
        "correct_pred_norm target_norm_std learnable_snr_gos pred_scaler adaptive_scaling_factor "
        "latent_feature_extractor_path diffusion_feature_extractor_path",
        "images were brought to another mean": "standardize_images standardize_latents",
        "the network was told no guidance": "bypass_guidance_embedding",
        "other captions were told, too": "short_and_long_captions prompt_saturation_chance",
    },
    random={say.TIMESTEPS: "content_or_style", say.DROPOUT: "prompt_dropout_prob"},
    inert="steps batch_size gradient_accumulation gradient_accumulation_steps train_unet lr "
    "train_text_encoder gradient_checkpointing optimizer optimizer_params unet_lr text_encoder_lr "
    "lr_scheduler lr_scheduler_params dtype ema_config disable_sampling skip_first_sample "
    "force_first_sample cache_text_embeddings max_grad_norm max_loss reg_weight xformers sdp "
    "attention_backend diff_output_preservation_multiplier diff_output_preservation_class "
    "inverted_mask_prior_multiplier blank_prompt_preservation_multiplier start_step "
    "switch_boundary_every num_train_timesteps unconditional_prompt guidance_loss_target",
    off=("mse", "noise", "balanced", *ONE),
)
MODEL = Table(
    other={
        say.PART: "vae_path refiner_name_or_path unet_path te_name_or_path",
        say.MERGED: "lora_path assistant_lora_path accuracy_recovery_adapter",
        say.QUANTISED: "quantize quantize_te",
        say.PADDING: "attn_masking",
    },
    inert="low_vram dtype vae_dtype te_dtype qtype qtype_te compile layer_offloading model_kwargs "
    "layer_offloading_text_encoder_percent layer_offloading_transformer_percent quantize_kwargs "
    "extras_name_or_path inference_lora_path split_model_over_gpus",
)
DATA = Table(
    other={
        say.CONTROL: "control_path control_path_1 control_path_2 control_path_3 controls "
        "inpaint_path unconditional_path clip_image_path",
        say.OF_FOLDER: "loss_multiplier network_weight",
        say.ALPHA: "alpha_mask",
        "images were scaled first": "scale",
        "videos": "num_frames",
    },
    random={
        say.ORDER: "shuffle_tokens",
        say.TAGS: "token_dropout_rate",
        say.CROP: "random_crop",
        say.TURNS: "random_scale",
        say.COLOURS: "augments augmentations",
        "words were added at random; here none": "random_triggers",
        "mirrored copies were examples, too; here the images alone": "flip_x flip_y",
    },
    inert="type cache_latents cache_latents_to_disk cache_text_embeddings num_workers keep_tokens "
    "prefetch_factor bucket_tolerance random_triggers_max replacements fast_image_size debug fps "
    "shrink_video_to_frames do_i2v replay_transforms full_size_control_images invert_mask "
    "mask_min_value control_transparent_color",
    off=ONE,
)


def recognises(found: Any) -> bool:
    """Tell whether a config is one of ai-toolkit's jobs."""
    return isinstance(found, Mapping) and found.get("job") == "extension" and _process(found) != {}


def _process(found: Mapping[str, Any]) -> dict[str, Any]:
    config = found.get("config")
    several = config.get("process") if isinstance(config, Mapping) else None
    each = [p for p in several if isinstance(p, dict)] if isinstance(several, list) else []
    return next((p for p in each if p.get("type") in PROCESSES), {})


def read(source: Path, found: Mapping[str, Any], places: Places) -> TrainingRun:
    """Return what a job of ai-toolkit says."""
    run = TrainingRun("ai-toolkit", source)
    keys = Keys(_process(found), run)
    name = run.name = Keys(found["config"], run, "config").get("name", "job", str)
    if not keys.get("network"):
        raise adapter.refuse_whole(run, "no network")
    model, train = keys.inside("model"), keys.inside("train")
    is_keys = [key for key in model.values if key.startswith("is_") and key != "is_v_pred"]
    named = [key[3:] for key in is_keys if model.get(key, False, bool)]
    kind = OLDER.get(named[0], named[0]) if named else "sd1"
    kind = model.get("arch", kind, str).partition(":")[0]
    family = family_of(run, kind, FAMILIES, places)
    base = model.get("name_or_path", kind=str)
    run.family, run.model = base_model(run, places, base, family)
    if run.family == "stable_diffusion_xl":
        run.model["sizes_from"] = "cut"
    _loss(train, model, run)
    place = keys.get("training_folder", "output", str).replace("[name]", name)
    folder_of_run = places.seek(f"{place}/{name}", "training_folder") or source.parent
    last, way = f"{name}.safetensors", f"{name}_*.safetensors"
    adapter.take(run, places, "training_folder", folder_of_run, last, way)
    run.facts |= train.known("steps", "batch_size", "lr")
    parts = _folders(keys, places, train)
    for part, table in ((keys, TOP), (train, TRAIN), (model, MODEL)):
        part.apply(table)
    run.data = together(parts, run)
    return run


def _loss(train: Keys, model: Keys, run: TrainingRun) -> None:
    train.refuse({say.CUT_OFF: "max_denoising_steps"}, off=(999, 1000))
    if (kind := train.get("timestep_type", "sigmoid", str)) == "weighted":
        train.note(run.other, "timestep_type", kind, say.WEIGHTS)
    train.note(run.random, "timestep_type", kind, say.TIMESTEPS)
    scheduler = train.get("noise_scheduler", "ddpm", str)
    if (scheduler == "flowmatch") != (run.family in FLOWS):
        train.note(run.other, "noise_scheduler", scheduler, say.SCHEDULE)
    if model.get("is_v_pred", False, bool):
        model.note(run.taken, "is_v_pred", True, say.PREDICTION)
        train.refuse({say.WEIGHTS: "min_snr_gamma"})  # of noise prediction, for v


def _folders(keys: Keys, places: Places, train: Keys) -> dict[str, dict[str, Any]]:
    run, parts = keys.run, dict[str, dict[str, Any]]()
    dropped = set()
    for each in keys.each("datasets"):
        key = "folder_path" if each.get("folder_path") else "dataset_path"
        path = each.get(key, "", str).replace("[name]", run.name)
        if each.get("is_reg", False, bool):
            each.note(run.other, "is_reg", path, say.PRIOR)
            continue
        root = Path(places.folder(path, each.name(key)))
        if not root.is_dir():
            raise DminError(
                f"{run.source}: {each.name(key)} = {root} is a table of captions, which is not "
                f"read yet. Name a folder with captions in .txt beside the images."
            )
        dropped.add(each.get("caption_dropout_rate", 0.0, float))
        sizes = each.get("resolution", 512)
        whole = each.get("buckets", True, bool) and not each.get("square_crop", False, bool)
        step = 16 if run.family in FLOWS else 8
        shapes = [
            bucket(size, whole, step, False, run)
            for size in (sizes if isinstance(sizes, list) and sizes else [sizes])
        ]
        part = folder(
            root.as_posix(),
            _captions(each, keys, train),
            SUFFIXES,
            repeats=each.get("num_repeats", 1, int),
            recursive=True,
            leave=("_controls/",),
            **masks(
                each,
                "mask_path",
                places,
                invert=each.get("invert_mask", False, bool),
                least=each.get("mask_min_value", 0.0, float),
                proportion=True,
                normalised=True,
            ),
        )
        each.randoms({"masks were blurred a little; here sharp": "mask_path"})
        each.note(run.taken, key, root.name, f"data, {part['repeats']:g} repeats")
        each.apply(DATA)
        add(parts, root.name, part, run, shapes)
    if len(dropped) == 1 and any(dropped):
        run.model["prompt_dropout"] = dropped.pop()
    elif len(dropped) > 1:
        keys.note(run.random, "caption_dropout_rate", sorted(dropped), say.DROPOUT)
    return parts


def _captions(each: Keys, keys: Keys, train: Keys) -> dict[str, Any]:
    """Return how captions are found: whole files, parted at commas and joined again."""
    trigger = each.get("trigger_word", keys.get("trigger_word", kind=str), str)
    if train.get("unload_text_encoder", False, bool):
        each.note(each.run.taken, "unload_text_encoder", True, "every caption was the trigger word")
        return {"source": "text", "text": trigger or ""}
    default = each.get("default_caption", kind=str)
    extension = each.get("caption_ext", ".txt", str).lstrip(".")
    if extension == "json":
        each.note(each.run.other, "caption_ext", extension, "captions in JSON are not read yet")
    return {
        "extensions": [f".{extension}"],
        "missing": "text" if default else "empty",
        "empty_is_missing": bool(default),
        "text": default,
        "rejoin": [",", ", "],
        "replace": {"[trigger]": trigger or "", "[name]": trigger or ""},
        "trigger": trigger,
    }
