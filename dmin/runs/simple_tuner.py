"""SimpleTuner: one JSON or TOML of options, and a JSON of data backends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmin.runs import adapter, base_model, checkpoints, wording as say
from dmin.runs.files import Places, load
from dmin.runs.folders import (
    IMAGES,
    add,
    bucket,
    folder,
    given,
    masks,
    several_lines,
    sides,
    together,
)
from dmin.runs.keys import Keys
from dmin.runs.trainer_tables import GIVEN, Setting, families, table
from dmin.runs.training_run import TrainingRun
from dmin.runtime.errors import DminError

CONFIGS = ("*.json", "*.toml", "config/*.json", "config/*.toml")
SPLITS = {"comma": ",", "space": " ", "semicolon": ";", "period": "."}
SHARED = "resolution resolution_type caption_strategy instance_prompt aspect_bucket_alignment"


def recognises(found: Any) -> bool:
    """Return whether a config is one of SimpleTuner's."""
    keys = _plain(found) if isinstance(found, Mapping) else {}
    return {"model_family", "data_backend_config"} <= keys.keys()


def _plain(found: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key).removeprefix("--"): value for key, value in found.items()}


def read(source: Path, found: Mapping[str, Any], places: Places) -> TrainingRun:
    """Read a config of SimpleTuner."""
    run = TrainingRun("SimpleTuner", source)
    keys = Keys(_plain(found), run)
    if (kind := keys.get("model_type", "full", str)) != "lora":
        raise adapter.refuse_whole(run, f"model_type = {kind}")
    base = keys.get("pretrained_model_name_or_path", kind=str)
    base_model.take(run, places, base, keys.get("model_family"), families("simple_tuner"))
    keys.bounded()
    kind = keys.get("prediction_type", "model", str)
    if kind in ("epsilon", "v_prediction", "sample"):
        base_model.predicts(keys, "prediction_type", kind)
    if keys.get("caption_dropout_probability") is None:
        meaning = "0 or 0.1, by its version; here 0. Set model.prompt_dropout=0.1 if it was 0.1"
        keys.note(run.random, "caption_dropout_probability", "not said", meaning)
    if keys.get("offset_noise", False, bool):
        if keys.get("noise_offset_probability", 0.25, float) == 1:
            keys.setting("noise_offset", Setting("noise_offset", 0.1))
        else:
            keys.note(run.other, "offset_noise", True, "an offset of noise in a share of the steps")
    place = keys.get("output_dir", "simpletuner-results", str)
    run.name = Path(place).name or "run"
    name = "pytorch_lora_weights.safetensors"
    folder_of_run = places.seek(place, "output_dir")
    adapter.take(run, places, "output_dir", folder_of_run, name, f"checkpoint-*/{name}")
    known = ("constant", "constant_with_warmup")
    checkpoints.schedule(keys, "max_train_steps", "num_train_epochs", default="sine", known=known)
    run.facts |= keys.known("learning_rate", "train_batch_size", "seed")
    parts = None if "data" in places.said else _folders(keys, places)
    keys.apply(table("simple_tuner", "options"))
    run.data = together(parts, run)
    return run


def _folders(keys: Keys, places: Places) -> dict[str, dict[str, Any]]:
    """Return the folders of the image backends, with their masks."""
    run, parts = keys.run, dict[str, dict[str, Any]]()
    file = places.find(keys.get("data_backend_config", "", str), "data_backend_config")
    shared = {key: keys.values[key] for key in SHARED.split() if key in keys.values}
    found = Keys({"backends": load(file)}, run).each("backends")
    backends = [Keys({**shared, **each.values}, run, each.where) for each in found]
    named = {str(each.get("id")): each for each in backends}
    of_image = {str(each.get("source_dataset_id")): each for each in backends}
    for each in backends:
        kind = each.get("dataset_type", "image", str)
        off = each.get("disabled", False, bool) or each.get("disable", False, bool)
        if kind == "text_embeds":
            each.refuse({"captions were changed by rules": "caption_filter_list"})
        if kind in ("video", "audio") and not off:
            each.note(run.other, "dataset_type", kind, "no images: left out")
        if kind != "image" or off:
            continue
        name = each.get("id", "data", str)
        each.refuse({say.PRIOR: "is_regularisation_data is_regularization_data"})
        if any(each.get(f"is_regulari{z}ation_data", False, bool) for z in "sz"):
            continue
        if (where := each.get("type", "local", str)) != "local":
            raise DminError(
                f"{run.source}: {each.name('type')} = {where}, but local images are needed: "
                f"download them into a folder, and set it with type local in a copy of the file."
            )
        linked = each.get("conditioning_data")
        linked = linked[0] if isinstance(linked, list) and linked else linked
        mask = named.get(str(linked)) if linked else of_image.get(name)
        root = places.folder(each.get("instance_data_dir", "", str), each.name("instance_data_dir"))
        passes = (1 + each.get("repeats", 0, int)) * each.get("probability", 1.0, float)
        shape = _shape(each) | (_masks(mask, places, Path(root)) if mask else {})
        draws = {"crop": each.draw("crop_style", on=each.get("crop_style", "", str) == "random")}
        captions = _captions(each, Path(root), draws, places)
        shape |= {"repeats": passes, "draws": draws}
        part = folder(root, captions, IMAGES, recursive=True, **shape)
        each.note(run.taken, "instance_data_dir", root, f"data, {passes:g} passes per epoch")
        each.apply(table("simple_tuner", "backends"))
        add(parts, name, part, run)
    return parts


def _shape(each: Keys) -> dict[str, Any]:
    """Return size and aspect, from the area in pixels or megapixels, or from the shorter side."""
    kind = each.get("resolution_type", "pixel_area", str)
    size = each.get("resolution", 1024.0, float)
    side = sides((size * 1e6) ** 0.5 if kind == "area" and size > 0 else size, each.run)[0]
    step = each.get("aspect_bucket_alignment", 64, int)
    square = each.get("crop", False, bool) and each.get("crop_aspect", "square", str) == "square"
    shape = bucket(side, not square, step, True, each.run)
    if kind == "pixel" and not square:
        longer = range(side, 3 * side + 1, step)
        shape["bucket_shapes"] = [*([side, n] for n in longer), *([n, side] for n in longer[1:])]
    return shape


def _masks(mask: Keys, places: Places, root: Path) -> dict[str, Any]:
    kind = mask.get("conditioning_type", "", str)
    if kind == "mask":
        return masks(mask, "instance_data_dir", places)
    if kind != "segmentation" and mask.run.family in GIVEN:
        return given(mask, "instance_data_dir", places, root)
    mask.note(mask.run.other, "conditioning_type", kind, say.CONTROL)
    return {}


def _captions(each: Keys, root: Path, draws: dict[str, Any], places: Places) -> dict[str, Any]:
    """Return settings of captions: by default made from the names of the image files."""
    source = each.get("caption_strategy", "filename", str)
    told = each.get("instance_prompt")
    several = told if isinstance(told, list) else [told]
    prompt = several[0] if several and isinstance(several[0], str) else ""
    draws["lines"] = each.draw("instance_prompt", on=len(several) > 1)
    if len(several) > 1:
        each.note(each.run.random, "instance_prompt", told, say.ONE_OF)
    shuffle = each.inside("caption_shuffle")
    if shuffle.get("enable", False, bool):
        each.note(each.run.random, "caption_shuffle", True, say.ORDER)
        mark = SPLITS.get(shuffle.get("split_on", "comma", str))
        draws |= {"shuffle": each.draw("caption_shuffle", on=mark is not None), "separator": mark}
        draws |= {"keep": shuffle.get("position_start", 0, int)}
    if source == "instanceprompt" or each.get("only_instance_prompt", False, bool):
        others = [text for text in several[1:] if isinstance(text, str)]
        return {"source": "text", "text": prompt, "others": others}
    before = each.get("prepend_instance_prompt", False, bool)
    prefix = {"prefix": f"{prompt} "} if before and prompt else {}
    if source == "filename":
        return {"source": "names", **prefix}
    if source == "textfile":
        whole = each.get("disable_multiline_split", False, bool)
        if not whole and several_lines(root):
            draws["lines"] = each.draw("caption_strategy", on=True)
            each.note(each.run.random, "caption_strategy", source, say.ONE_OF)
        return {"extensions": [".txt"], "lines": "whole" if whole else "each", **prefix}
    if source == "parquet":
        table = each.inside("parquet")
        file = places.folder(table.get("path", "", str), table.name("path"))
        asked = table.get("caption_column", "description")
        asked = asked if isinstance(asked, list) else [asked]
        columns = [str(c) for c in (*asked, table.get("fallback_caption_column")) if c]
        key = table.get("filename_column", "id", str)
        draws["lines"] = each.draw("caption_strategy", on=True)
        each.note(each.run.random, "caption_strategy", source, say.ONE_OF)
        return {"source": "table", "table": file, "key": key, "columns": columns, **prefix}
    raise DminError(
        f"{each.run.source}: {each.name('caption_strategy')} = {source}, which is not supported: "
        f"write each caption into a .txt next to its image, and set textfile in a copy of the "
        f"file."
    )
