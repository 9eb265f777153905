"""kohya sd-scripts (and its GUI): a TOML of options, and one of data sets or numbered folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmin.runs.base_model import base_model
from dmin.runs.files import Places, header, load
from dmin.runs.folders import MASKS, add, bucket, folder, together
from dmin.runs.training_run import Entry, Keys, TrainingRun
from dmin.runtime.errors import DminError

# Module of the network → family; None: the base model tells.
FAMILIES = {
    "networks.lora": None,
    "lycoris.kohya": None,
    "networks.lora_flux": "flux",
    "networks.lora_sd3": "stable_diffusion_3",
}
CONFIGS = ("*.toml", "*.json")  # where its configs lie below a folder
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
OTHER_LOSS = {
    "alpha_mask": "the loss is weighed by the images' alpha, which dmin does not do yet",
    "debiased_estimation_loss": "weights of 1/√SNR are not computed",
    "scale_v_pred_loss_like_noise_pred": "v-prediction weighed as noise prediction",
    "v_pred_like_loss": "a second loss of v",
    "adaptive_noise_scale": "a noise offset that depends on the latents",
    "multires_noise_iterations": "noise of several resolutions",
    "zero_terminal_snr": "the noise schedule is rescaled; save the base model with it",
    "reg_data_dir": "images of prior preservation",
    "clip_skip": "captions are read from an earlier layer of the text encoder",
    "weighted_captions": "words of captions are weighed",
    "min_timestep": "timesteps are cut off: say timesteps=explicit to take the same",
    "max_timestep": "timesteps are cut off: say timesteps=explicit to take the same",
    "fp8_base": "the base model was quantised to 8 bits while training",
    "base_weights": "further adapters were merged into the base model",
}
RANDOM = {
    "shuffle_caption": "the order of tags was drawn each time; here as written",
    "flip_aug": "half of the passes saw the mirror image; here the image",
    "color_aug": "colours were changed at random; here as they are",
    "random_crop": "the crop was drawn each time; here the middle",
    "face_crop_aug_range": "crops around faces were drawn; here the middle",
    "caption_dropout_every_n_epochs": "some epochs had no captions",
    "caption_tag_dropout_rate": "tags were dropped at random; here all",
    "token_warmup_step": "captions grew over the first steps; here whole",
    "enable_wildcard": "one of several captions was drawn; here the first",
}
# What changes no gradient of the weights that came out.
INERT = (
    "output_* save_* log_* logging_* wandb_* tracker_* sample_* huggingface_* hub_* "
    "train_batch_size optimizer_* optimizer learning_rate unet_lr text_encoder_lr lr_* lr "
    "max_train_* max_grad_norm gradient_* mixed_precision full_bf16 full_fp16 no_half_vae "
    "xformers sdpa mem_eff_attn cache_* dataset_config vae_batch_size "
    "persistent_data_loader_workers max_data_loader_n_workers seed lowram highvram "
    "training_comment metadata_* no_metadata deepspeed* ddp_* dynamo_* torch_compile "
    "network_dropout scale_weight_norms skip_* bucket_* debug_dataset dataset_repeats resume* "
    "stop_text_encoder_training prior_loss_weight max_token_length fused_* blocks_to_swap "
    "initial_* validation_* validate_* console_* async_upload epoch lora_weights lowvram "
    "dim_from_weights network_weights extra_config config_file dataset_class apply_t5_attn_mask "
    "disable_mmap_load_safetensors noise_offset_random_strength ip_noise_gamma_random_strength"
)
# What folders are described by, at whatever level.
DATA = (
    "resolution enable_bucket bucket_* min_bucket_reso max_bucket_reso caption_* num_repeats "
    "class_tokens keep_tokens* secondary_separator batch_size cache_info resize_interpolation "
    "token_warmup_* validation_* train_data_dir shuffle_caption flip_aug color_aug random_crop "
    "face_crop_aug_range enable_wildcard"
)


def recognises(found: Any) -> bool:
    """Tell whether a config is one of kohya's trainers."""
    if not isinstance(found, Mapping):
        return False
    keys = set(_flat(found))
    return "pretrained_model_name_or_path" in keys and bool(
        keys & {"network_module", "train_data_dir", "dataset_config"}
    )


def read(source: Path, found: Mapping[str, Any], places: Places) -> TrainingRun:
    """Return what a kohya config says."""
    run = TrainingRun("kohya sd-scripts", source)
    keys = Keys(_flat(found), run)
    module = keys.get("network_module", kind=str)
    if module is None:
        raise DminError(
            f"{source} trains the whole network (no network_module): name the model that came out "
            f"by model.path=…, and its data by data=image_folder data.root=…"
        )
    if module not in FAMILIES:
        raise DminError(
            f"{source}: network_module = {module}, of which dmin reads no adapters. It reads "
            f"{', '.join(FAMILIES)}."
        )
    base = keys.get("pretrained_model_name_or_path", kind=str)
    run.family, run.model = base_model(run, places, base, FAMILIES[module])
    _loss(keys, run)
    run.model["adapter"] = _adapter(keys, run, places)
    if vae := keys.get("vae"):
        run.other.append(Entry("vae", vae, "another VAE: save the base model with it"))
    keys.refuse({"network_train_text_encoder_only": "the text encoders alone were trained"})
    keys.skip("network_train_unet_only network_args")
    run.collect["params"] = "lora"
    run.facts = {
        name: keys.get(name)
        for name in ("network_dim", "network_alpha", "max_train_steps", "max_train_epochs", "seed")
        if keys.get(name) is not None
    }
    run.data = together(_folders(keys, run, places), run)
    run.model["empty_captions"] = "keep"  # what it makes of images without a caption
    keys.skip(f"{INERT} {DATA}")
    keys.finish()
    return run


def _loss(keys: Keys, run: TrainingRun) -> None:
    """Take what the loss is made of."""
    model = run.model
    for key, setting, off in (
        ("min_snr_gamma", "snr_gamma", None),
        ("noise_offset", "noise_offset", 0.0),
        ("ip_noise_gamma", "input_perturbation", 0.0),
        ("huber_c", "huber_c", None),
        ("guidance_scale", "embedded_guidance", None),
        ("discrete_flow_shift", "shift", None),
        ("t5xxl_max_token_length", "max_sequence_length", None),
    ):
        value = keys.take(key, f"model.{setting}", kind=float, off=off)
        if value is not None and value != off:
            model[setting] = int(value) if setting == "max_sequence_length" else value
    kind = keys.take("loss_type", "model.loss_type", "l2", str, off="l2")
    if kind in ("huber", "smooth_l1"):
        model["loss_type"] = kind
        model["huber_schedule"] = keys.get("huber_schedule", "snr", str)
    elif kind != "l2":
        run.other.append(Entry("loss_type", kind, "dmin computes l2, huber and smooth_l1"))
    dropout = keys.take("caption_dropout_rate", "model.prompt_dropout", 0.0, float, off=0.0)
    if dropout:
        model["prompt_dropout"] = dropout
    # What a base model is told of its own prediction is read from its scheduler.
    if keys.get("v_parameterization", False, bool):
        meaning = "v-prediction: the base model's scheduler must say so, and is read"
        run.taken.append(Entry("v_parameterization", True, meaning))
    keys.refuse(OTHER_LOSS)
    for key in ("timestep_sampling", "weighting_scheme"):
        keys.random(key, "how often each timestep was drawn; here all alike", str)
    keys.skip(
        "sigmoid_scale logit_* mode_scale v2 model_prediction_type huber_schedule keep_tokens "
        "masked_loss "
        "caption_separator clip_l t5xxl ae"
    )


def _adapter(keys: Keys, run: TrainingRun, places: Places) -> str | None:
    """Return the file that came out: the last, else the latest of those on the way."""
    place = keys.get("output_dir", ".", str)
    name = run.name = keys.get("output_name", "last", str)
    if said := places.said.get("adapter"):
        run.taken.append(Entry("output_name", said, "model.adapter, as you say"))
        return said
    folder = places.folder(place, "output_dir")
    last = Path(folder) / f"{name}.safetensors"
    way = sorted(Path(folder).glob(f"{name}-*.safetensors"))
    run.facts["checkpoints"] = [file.as_posix() for file in way]
    if not last.is_file() and not way:
        raise DminError(
            f"{run.source}: output_dir = {folder} has no {last.name}. Name the adapter: "
            f"model.adapter=FILE, or where the run's files are: run.root=FOLDER."
        )
    file = last if last.is_file() else way[-1]
    if parts := sum(name.startswith("lora_te") for name in header(file)):
        raise DminError(
            f"{file} trained the text encoders too ({parts} tensors lora_te…), whose part dmin "
            f"does not attribute yet. It opens those of network_train_unet_only."
        )
    run.taken.append(Entry("output_name", file.name, "model.adapter"))
    return file.as_posix()


def _folders(keys: Keys, run: TrainingRun, places: Places) -> dict[str, dict[str, Any]]:
    """Return the folders of a run, by name."""
    config = keys.get("dataset_config", kind=str)
    if config is None:
        text = keys.get("train_data_dir", kind=str)
        if text is None:
            raise DminError(
                f"{run.source} names no data: neither dataset_config nor train_data_dir."
            )
        root = Path(places.folder(text, "train_data_dir"))
        return _numbered(root, [keys], places, run)
    file = places.find(config, "dataset_config")
    found = load(file)
    general = Keys(found.get("general") or {}, run, "general")
    parts: dict[str, dict[str, Any]] = {}
    for number, levels in enumerate(_list(found.get("datasets"), file, "datasets")):
        where = f"datasets[{number}]"
        dataset = Keys(levels, run, where)
        for at, subset in enumerate(_list(levels.get("subsets"), file, f"{where}.subsets")):
            inside = Keys(subset, run, f"{where}.subsets[{at}]")
            name, part = _subset(inside, [dataset, general, keys], places, run)
            if part is not None:
                add(parts, name, part, run)
        dataset.skip(f"{DATA} subsets")
        dataset.finish()
    general.skip(DATA)
    general.finish()
    return parts


def _numbered(
    root: Path, fallback: Sequence[Keys], places: Places, run: TrainingRun
) -> dict[str, dict[str, Any]]:
    """Return the folders ``N_class tokens`` below a folder, as kohya reads them."""
    parts = {}
    for path in sorted(each for each in root.iterdir() if each.is_dir()):
        match = re.match(r"(\d+)_(.*)", path.name)
        if match is None or int(match[1]) < 1:
            run.unknown.append(f"folder {path.name} (no number of repeats before a _)")
            continue
        keys = Keys({"class_tokens": match[2], "num_repeats": int(match[1])}, run, path.name)
        part = _part(keys, path.as_posix(), fallback, places, run)
        run.taken.append(Entry(path.name, int(match[1]), f"repeats; class tokens {match[2]!r}"))
        parts[path.name] = part
    if not parts:
        raise DminError(f"{run.source}: {root} has no folder named as 3_class tokens.")
    return parts


def _subset(
    keys: Keys, fallback: Sequence[Keys], places: Places, run: TrainingRun
) -> tuple[str, dict[str, Any] | None]:
    table = keys.get("metadata_file", kind=str)
    text = keys.get("image_dir", kind=str)
    if text is None:
        raise DminError(f"{run.source}: {keys.name('image_dir')} is not there.")
    root = places.folder(text, keys.name("image_dir"))
    name = Path(root).name
    if keys.get("is_reg", False, bool):
        meaning = "images of prior preservation: left out, and their loss with them"
        run.other.append(Entry(keys.name("is_reg"), name, meaning))
        return name, None
    part = _part(keys, root, fallback, places, run)
    if table is not None:
        found = places.folder(table, keys.name("metadata_file"))
        part["captions"] |= {"source": "table", "table": found, "missing": "error"}
    run.taken.append(Entry(keys.name("image_dir"), name, f"data, {part['repeats']:g} repeats"))
    keys.finish()
    return name, part


def _part(
    keys: Keys, root: str, fallback: Sequence[Keys], places: Places, run: TrainingRun
) -> dict[str, Any]:
    """Return one folder's settings; what it does not say the levels above do."""

    def say(key: str, default: Any, kind: type | None = None) -> Any:
        for level in (keys, *fallback):
            if key in level.values:
                return level.get(key, default, kind)
        return default

    tokens = say("class_tokens", None, str)
    prefix, suffix = say("caption_prefix", "", str), say("caption_suffix", "", str)
    captions = {
        "extensions": [_dotted(say("caption_extension", ".caption", str))],
        "lines": "first",
        "missing": "text" if tokens else "empty",
        "text": tokens,
        "prefix": f"{prefix} " if prefix else "",
        "suffix": f" {suffix}" if suffix else "",
    }
    size = say("resolution", 512)
    shape = bucket(
        size,
        say("enable_bucket", False, bool),
        int(say("bucket_reso_steps", 64, int)),
        not say("bucket_no_upscale", False, bool),
        run,
    )
    for key, meaning in RANDOM.items():
        if value := say(key, None):
            run.random.append(Entry(keys.name(key), value, meaning))
    keys.refuse({key: OTHER_LOSS[key] for key in ("alpha_mask",)})
    masks = keys.get("conditioning_data_dir", kind=str)
    if masks and say("masked_loss", False, bool):
        found = places.folder(masks, keys.name("conditioning_data_dir"))
        shape["masks"] = {"_target_": MASKS, "folder": found, "required": True}
        run.taken.append(Entry(keys.name("conditioning_data_dir"), found, "masks of the loss"))
    elif masks:
        run.other.append(Entry(keys.name("conditioning_data_dir"), masks, "images of a ControlNet"))
    keys.skip(DATA)
    repeats = float(say("num_repeats", 1, int))
    return folder(root, captions, SUFFIXES, repeats=repeats, **shape)


def _flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a TOML; its sections are flattened, their names mean nothing."""
    flat: dict[str, Any] = {}
    for key, value in found.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def _dotted(extension: str) -> str:
    return extension if extension.startswith(".") else f".{extension}"


def _list(found: Any, file: Path, key: str) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not found or not all(isinstance(e, dict) for e in found):
        raise DminError(f"{file}: {key} is no list of tables, of which one or more are needed.")
    return found
