"""OneTrainer: one JSON of settings, and one of concepts, which are folders of images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmin.runs import adapter, base_model, checkpoints, wording as say
from dmin.runs.files import Places, header, load, spelled
from dmin.runs.folders import MASKS, add, folder, ratios, several_lines, sides, together
from dmin.runs.keys import Keys
from dmin.runs.trainer_tables import GIVEN, Setting, families, table
from dmin.runs.training_run import Entry, TrainingRun
from dmin.runtime.errors import DminError

CONFIGS = ("*.json", "config/*.json", "backup/*/onetrainer_config/args.json", "*.safetensors")
SUFFIXES = (".bmp", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".avif")
LEFT = ("-masklabel", "-condlabel")  # endings of names of files that are not examples
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
ASPECTS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4)
ROUNDED = {"float_8": "float8", "nfloat_4": "nf4"}
PLAIN = ("NONE", "FLOAT_32", "FLOAT_16", "BFLOAT_16", "TFLOAT_32")


def recognises(found: Any) -> bool:
    """Return whether a config is one of OneTrainer's."""
    return {"training_method", "model_type"} <= _config(found).keys()


def _config(found: Any) -> Mapping[str, Any]:
    """Return a config, which may be in the header of a trained file."""
    try:
        told = json.loads(found["ot_config"]) if "ot_config" in found else found
    except (TypeError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, Mapping) else {}


def read(source: Path, found: Mapping[str, Any], places: Places) -> TrainingRun:
    """Read a config of OneTrainer."""
    run = TrainingRun("OneTrainer", source)
    keys = Keys(_config(found), run)
    version = keys.get("__version", 11, int)
    if version < 10:
        raise DminError(
            f"{source} is of an older OneTrainer (__version = {version}; 10 and later are read). "
            f"Load it in a newer version, and use the copy that it saves."
        )
    if (method := keys.get("training_method", kind=str)) != "LORA":
        raise adapter.refuse_whole(run, f"training_method = {method}")
    base = keys.get("base_model_name", kind=str)
    base_model.take(run, places, base, keys.get("model_type"), families("onetrainer"))
    _loss(keys, run)
    _parts(keys, run)
    last = places.seek(keys.get("output_model_destination", kind=str), "output_model_destination")
    last = source if source.suffix == ".safetensors" else last
    work = places.seek(keys.get("workspace_dir", kind=str), "workspace_dir")
    folder, name = (last.parent, last.name) if last else (work, "")
    adapter.take(run, places, "output_model_destination", folder, name, "save/*.safetensors")
    run.name = Path(run.model["adapter"]).stem
    if words := keys.get("additional_embeddings", kind=list):
        inside = any(name.startswith("bundle_emb.") for name in header(Path(run.model["adapter"])))
        told = "learned words, in the adapter's file" if inside else say.LEARNED
        keys.note(run.taken if inside else run.other, "additional_embeddings", len(words), told)
    names = {"name": "learning_rate_scheduler", "warmup": "learning_rate_warmup_steps"}
    checkpoints.schedule(keys, "steps", **names, known=("constant_with_warmup",))
    run.facts |= keys.known("batch_size", "learning_rate", "lora_rank", "lora_alpha")
    parts = None if "data" in places.said else _concepts(keys, run, places)
    keys.apply(table("onetrainer", "options"))
    run.data = together(parts, run)
    return run


def _loss(keys: Keys, run: TrainingRun) -> None:
    keys.refuse({say.CUT_OFF: "max_noising_strength"}, off=(1, "1.0"))
    for kind in ("v_prediction", "epsilon"):
        if keys.get(key := f"force_{kind}" + "_prediction" * (kind == "epsilon"), False, bool):
            base_model.predicts(keys, key, kind)
    if run.family == "pixart" and keys.get("vb_loss_strength", 1.0, float):
        keys.note(run.other, "vb_loss_strength", keys.get("vb_loss_strength", 1.0), say.TERMS)
    weight = keys.get("loss_weight_fn", "CONSTANT", str)
    if weight == "MIN_SNR_GAMMA":
        keys.setting("loss_weight_strength", Setting("snr_gamma", 5.0))
    elif weight != "CONSTANT":
        keys.note(run.other, "loss_weight_fn", weight, say.WEIGHTS)


def _parts(keys: Keys, run: TrainingRun) -> None:
    """Take the settings of the network, the text encoders and the VAE, each in its own table."""
    own = ENCODERS[: 1 + (run.family != "stable_diffusion")]
    for name in ("unet", "transformer", "vae", *ENCODERS):
        part = keys.inside(name)
        if name in ENCODERS and name not in own:
            continue
        part.refuse({say.PART: "model_name", say.PADDING: "attention_mask"})
        if (kind := part.get("weight_dtype", "NONE", str)) not in PLAIN:
            if name in ENCODERS:
                part.note(run.random, "weight_dtype", kind, say.ROUNDED_TEXT)
            else:
                part.rounded("weight_dtype", kind, ROUNDED if name != "vae" else {})
        if name == "transformer":
            part.setting("guidance_scale", Setting("embedded_guidance", 1.0))
        if len(own) == 1 and name in own:
            part.setting("dropout_probability", Setting("prompt_dropout"))
        elif name in own and (share := part.get("dropout_probability", 0.0, float)):
            part.note(run.random, "dropout_probability", share, say.DROPOUT)


def _concepts(keys: Keys, run: TrainingRun, places: Places) -> dict[str, dict[str, Any]]:
    if not keys.get("concepts"):
        beside = run.source.parent / "concepts.json"
        name = keys.get("concept_file_name", "concepts.json", str)
        file = beside if beside.is_file() else places.find(name, "concept_file_name")
        keys.values["concepts"] = load(file)
    keys.get("concept_file_name")
    parts: dict[str, dict[str, Any]] = {}
    for concept in keys.each("concepts"):
        path, kind = concept.get("path", "", str), concept.get("type", "STANDARD", str)
        if not concept.get("enabled", True, bool):
            continue
        if kind == "PRIOR_PREDICTION":
            concept.note(run.other, "type", f"{kind} ({path})", say.PRIOR)
        elif kind != "STANDARD" or concept.get("validation_concept", False, bool):
            concept.note(run.taken, "type", kind, f"{path} was held out")
        else:
            _concept(concept, Path(places.folder(path, concept.name("path"))), keys, parts, places)
    return parts


def _concept(
    concept: Keys, root: Path, keys: Keys, parts: dict[str, dict[str, Any]], places: Places
) -> None:
    """Add the folder of a concept, once for each of its resolutions."""
    run, image = concept.run, concept.inside("image")
    deep = concept.get("include_subdirectories", False, bool)
    size = keys.get("resolution", "512")
    if image.get("enable_resolution_override", False, bool):
        size = image.get("resolution_override", "512")
    shapes = _shapes(size, keys.get("aspect_ratio_bucketing", True, bool), run)
    repeats = concept.get("balancing", concept.get("repeats", 1.0, float), float)
    if concept.get("balancing_strategy", "REPEATS", str) == "SAMPLES":  # images per epoch
        files = root.rglob("*") if deep else root.glob("*")
        images = [f for f in files if f.suffix.lower() in SUFFIXES and not f.stem.endswith(LEFT)]
        repeats /= max(1, len(images))
    concept.note(run.taken, "path", root.name, f"data, {repeats:g} repeats")
    if image.get("enable_crop_jitter", True, bool):
        image.note(run.random, "enable_crop_jitter", True, say.CROP)
    draws = {
        "flip": image.draw("enable_random_flip", 0.5),
        "crop": image.draw("enable_crop_jitter", on=image.get("enable_crop_jitter", True, bool)),
    }
    image.apply(table("onetrainer", "image"))
    concept.refuse({say.OF_FOLDER: "loss_weight"}, off=(1, "1.0"))
    more: dict[str, Any] = {}
    if run.family in GIVEN:
        more["condition_image"] = f"{LEFT[0]}.png"
        meaning = "in a share of the steps the mask was all white; here always the image's own"
        share = keys.get("unmasked_probability", 0.1, float)
        if share and not any(e.key == "unmasked_probability" for e in run.random):
            keys.note(run.random, "unmasked_probability", share, meaning)
    elif keys.get("masked_training", False, bool) and any(root.rglob(f"*{LEFT[0]}.png")):
        more["masks"] = {
            "_target_": MASKS,
            "suffix": f"{LEFT[0]}.png",
            "least": keys.get("unmasked_weight", 0.1, float),
            "normalised": keys.get("normalize_masked_area_loss", False, bool),
        }
        keys.note(run.taken, "masked_training", True, "masks of the loss")
    more |= {"repeats": repeats / len(shapes), "leave": [f"{end}.png" for end in LEFT]}
    captions = _captions(concept.inside("text"), root, places, draws)
    part = folder(spelled(root), captions, SUFFIXES, recursive=deep, draws=draws, **more)
    concept.skip("__version name seed image_variations text_variations concept_stats enabled")
    concept.finish()
    add(parts, root.name, part, run, shapes)


def _shapes(size: Any, bucketed: bool, run: TrainingRun) -> list[dict[str, Any]]:
    """Return the shapes of each resolution; OneTrainer draws one of several for each image."""
    if isinstance(size, str) and "x" in size:
        fixed = [max(64, round(each / 64) * 64) for each in (sides(size, run) * 2)[1::-1]]
        side = round((fixed[0] * fixed[1]) ** 0.5)
        return [{"size": side, "aspect": "buckets", "bucket_shapes": [fixed]}]
    listed = size.split(",") if isinstance(size, str) else [size]
    several = [sides(each, run)[0] for each in listed]
    if len(several) > 1:
        meaning = "one of them was drawn for each image; here all, sharing the repeats"
        run.random.append(Entry("resolution", size, meaning))
    if not bucketed:
        return [{"size": side, "aspect": "square"} for side in several]
    aspects = (*ASPECTS, *(1 / a for a in ASPECTS))
    return [{**ratios(side, aspects, 64), "bucket_ratio": "height/width"} for side in several]


def _captions(text: Keys, root: Path, places: Places, draws: dict[str, Any]) -> dict[str, Any]:
    """Return settings of captions: each line of a file is one; OneTrainer draws one of them."""
    source = text.get("prompt_source", "sample", str)
    kept, share = text.get("keep_tags_count", 1, int), text.get("tag_dropout_probability", 0, float)
    each = text.get("tag_dropout_enable", False, bool)
    each = each and text.get("tag_dropout_mode", "FULL", str) == "RANDOM"
    mark = text.get("tag_delimiter", ",", str)
    draws |= {
        "shuffle": text.draw("enable_tag_shuffling"),
        "drop": text.draw("tag_dropout_enable", share, on=each),
        **{"keep": kept, "spare": kept, "separator": mark, "joint": f"{mark} "},
    }
    text.apply(table("onetrainer", "text"))
    if source == "filename":
        return {"source": "stems"}
    if source == "concept":
        file = places.find(text.get("prompt_path", "", str), text.name("prompt_path"))
        try:
            lines = [each for each in file.read_text("utf-8-sig").splitlines() if each.strip()]
        except (OSError, ValueError) as error:
            raise DminError(f"{file} cannot be read as UTF-8 text ({error}). Fix it.") from error
        if len(lines) > 1:
            text.note(text.run.random, "prompt_path", file.name, say.ONE_OF)
        draws["lines"] = text.draw("prompt_path", on=len(lines) > 1)
        first, *others = [line.strip() for line in lines] or [""]
        return {"source": "text", "text": first, "others": others}
    if several_lines(root):
        draws["lines"] = text.draw("prompt_source", on=True)
        text.note(text.run.random, "prompt_source", source, say.ONE_OF)
    return {"extensions": [".txt"], "lines": "each", "missing": "empty"}
