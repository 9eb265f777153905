"""kohya sd-scripts (and its GUI): a TOML of options, and one of data sets or numbered folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmin.runs import adapter, base_model, checkpoints, wording as say
from dmin.runs.files import Places, load
from dmin.runs.folders import add, bucket, folder, masks, together
from dmin.runs.keys import Keys, is_off
from dmin.runs.trainer_tables import families, table
from dmin.runs.training_run import Entry, TrainingRun
from dmin.runtime.errors import DminError

CONFIGS = ("*.toml", "*.json")  # patterns of its configs in a folder
TAGS = ("shuffle_caption", "caption_tag_dropout_rate", "token_warmup_step")  # change tags
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")


def recognises(found: Any) -> bool:
    """Return whether a config is one of kohya's trainers."""
    if not isinstance(found, Mapping):
        return False
    keys = set(flat(found))
    return "pretrained_model_name_or_path" in keys and bool(
        keys & {"network_module", "train_data_dir", "dataset_config"}
    )


def read(source: Path, found: Mapping[str, Any], places: Places) -> TrainingRun:
    """Read a kohya config."""
    run = TrainingRun("kohya sd-scripts", source)
    keys = Keys(flat(found), run)
    module = keys.get("network_module", kind=str)
    if module is None:
        raise adapter.refuse_whole(run, "no network_module")
    known = families("kohya")
    if keys.get("model_type") == "chroma":
        known["networks.lora_flux"] = "chroma"
    base = keys.get("pretrained_model_name_or_path", kind=str)
    base_model.take(run, places, base, module, known)
    loss(keys, "v_prediction" if keys.get("v_parameterization", False, bool) else "epsilon")
    name = run.name = keys.get("output_name", "last", str)
    folder = places.seek(keys.get("output_dir", ".", str), "output_dir")
    adapter.take(run, places, "output_dir", folder, f"{name}.safetensors", f"{name}-*.safetensors")
    checkpoints.schedule(keys, "max_train_steps", "max_train_epochs")
    run.facts |= keys.known("network_dim", "network_alpha", "seed")
    parts = None if "data" in places.said else _folders(keys, run, places)
    keys.skip(table("kohya", "folders").inert)  # allowed at every level
    keys.apply(table("kohya", "options"))
    run.data = together(parts, run)
    return run


def loss(keys: Keys, predicted: str | None) -> None:
    """Take the options that define the loss.

    Args:
        keys: options of the trainer.
        predicted: the scheduler's ``prediction_type``; None if unknown.
    """
    run = keys.run
    keys.bounded()
    if predicted is not None:
        base_model.predicts(keys, "v_parameterization", predicted)
    keys.refuse({say.CUT_OFF: "max_timestep"}, off=(1000, "1000"))
    keys.refuse({say.LAYER: "clip_skip"}, off=(1, "1"))  # 1 is the last layer
    if run.family in ("stable_diffusion", "stable_diffusion_xl"):
        keys.refuse({say.PIECES: "max_token_length"}, off=(75, "75"))
    elif run.family == "stable_diffusion_3":  # its loss is an error of x0
        keys.weighted(of_x0=True)
    elif run.family in ("flux", "chroma"):
        kind = keys.get("model_prediction_type", "sigma_scaled", str)
        if kind != "raw":
            meaning = "an estimate of x0 was compared with the velocity"
            keys.note(run.other, "model_prediction_type", kind, meaning)


def _folders(keys: Keys, run: TrainingRun, places: Places) -> dict[str, dict[str, Any]]:
    """Return the folders of a run, by name."""
    config = keys.get("dataset_config", kind=str)
    if config is None:
        text = keys.get("train_data_dir", kind=str)
        if text is None:
            raise DminError(
                f"{run.source} names no data: it has neither dataset_config nor train_data_dir."
            )
        root = Path(places.folder(text, "train_data_dir"))
        return _numbered(root, [keys], places, run)
    return of_datasets(Keys(load(places.find(config, "dataset_config")), run), keys, places)


def of_datasets(found: Keys, keys: Keys, places: Places) -> dict[str, dict[str, Any]]:
    """Return the folders of a dataset config, by name.

    Args:
        found: ``general`` and ``datasets`` with their ``subsets``.
        keys: options of the trainer, the defaults of all folders.
        places: finds paths.
    """
    of_folders = table("kohya", "folders")
    general = found.inside("general")
    parts: dict[str, dict[str, Any]] = {}
    for dataset in found.each("datasets"):
        for inside in dataset.each("subsets"):
            name, part = _subset(inside, [dataset, general, keys], places, found.run)
            if part is not None:
                add(parts, name, part, found.run)
        dataset.skip(f"{of_folders.inert} subsets")
        dataset.finish()
    general.skip(of_folders.inert)
    general.finish()
    return parts


def _numbered(
    root: Path, above: Sequence[Keys], places: Places, run: TrainingRun
) -> dict[str, dict[str, Any]]:
    """Return the folders ``N_class tokens`` in a folder, as kohya reads them."""
    parts = {}
    for path in sorted(each for each in root.iterdir() if each.is_dir()):
        match = re.fullmatch(r"(\d+)(?:_(.*))?", path.name, re.DOTALL)
        if match is None or int(match[1]) < 1:
            run.unknown.append(f"folder {path.name} (no number of repeats)")
            continue
        keys = Keys({"class_tokens": match[2] or "", "num_repeats": int(match[1])}, run, path.name)
        part = _part(keys, path.as_posix(), above, places)
        meaning = f"repeats; class tokens {match[2] or ''!r}"
        run.taken.append(Entry(path.name, int(match[1]), meaning))
        parts[path.name] = part
    if not parts:
        raise DminError(f"{run.source}: {root} has no folder named like 3_class tokens.")
    return parts


def _subset(
    keys: Keys, above: Sequence[Keys], places: Places, run: TrainingRun
) -> tuple[str, dict[str, Any] | None]:
    """Return a folder's name and settings; None: a regularisation folder, left out."""
    root = places.folder(keys.get("image_dir", "", str), keys.name("image_dir"))
    name = Path(root).name
    if keys.get("is_reg", False, bool):
        keys.note(run.other, "is_reg", name, say.PRIOR)
        return name, None
    part = _part(keys, root, above, places)
    if listed := keys.get("metadata_file", kind=str):
        found = places.folder(listed, keys.name("metadata_file"))
        part["captions"] |= {"source": "table", "table": found, "missing": "error"}
        part["captions"]["key"] = "image_path"  # of .jsonl
    keys.note(run.taken, "image_dir", name, f"data, {part['repeats']:g} repeats")
    keys.finish()
    return name, part


def _part(own: Keys, root: str, above: Sequence[Keys], places: Places) -> dict[str, Any]:
    """Return one folder's settings; missing keys are taken from the levels above."""
    run, of_folders = own.run, table("kohya", "folders")
    levels = [level.values for level in (*above[::-1], own)]
    keys = Keys({k: v for level in levels for k, v in level.items()}, run, own.where)
    tokens = keys.get("class_tokens", kind=str)
    prefix, suffix = keys.get("caption_prefix", "", str), keys.get("caption_suffix", "", str)
    extension = keys.get("caption_extension", keys.get("caption_extention", ".caption", str), str)
    marks = [keys.get("secondary_separator", kind=str)]
    mark = keys.get("keep_tokens_separator", kind=str)
    if any(not is_off(keys.get(key)) for key in TAGS):  # kohya splits at it only then
        marks.append(mark)
    captions = {
        "extensions": [f".{extension.lstrip('.')}"],
        "replace": {mark: keys.get("caption_separator", ",", str) for mark in marks if mark},
        "lines": "first",
        "missing": "text" if tokens else "empty",
        "text": tokens,
        "prefix": f"{prefix} " if prefix else "",
        "suffix": f" {suffix}" if suffix else "",
    }
    shape = bucket(
        keys.get("resolution", 512),
        keys.get("enable_bucket", False, bool),
        keys.get("bucket_reso_steps", 64, int),
        not keys.get("bucket_no_upscale", False, bool),
        run,
    )
    listed = keys.get("bucket_shapes", kind=list)
    if "bucket_step" in shape and (listed or "upscale" not in shape):
        listed = listed or _buckets(shape["size"] ** 2, shape["bucket_step"], keys)
        of_kohya = {"bucket_shapes": listed, "bucket_ratio": "width/height"}
        shape = {"size": shape["size"], "aspect": "buckets", **of_kohya}
    keys.randoms(of_folders.random)
    shape["background"] = None
    if keys.get("alpha_mask", False, bool):
        shape |= masks(keys, "", places)
    elif keys.get("masked_loss", False, bool):
        shape |= masks(own, "conditioning_data_dir", places, required=True)
    else:
        own.refuse({say.CONTROL: "conditioning_data_dir"})
    own.skip(of_folders.inert)
    kept, dropped = keys.get("keep_tokens", 0, int), "caption_tag_dropout_rate"
    shape["draws"] = {
        "flip": keys.draw("flip_aug", 0.5),
        "crop": keys.draw("random_crop"),
        "lines": keys.draw("enable_wildcard"),
        "shuffle": keys.draw("shuffle_caption"),
        "drop": keys.draw(dropped, keys.get(dropped, 0.0, float)),
        **{"keep": kept, "spare": kept, "mark": mark, "whole": True},
        "separator": keys.get("caption_separator", ",", str),
    }
    shape["dropout"] = keys.get("caption_dropout_rate", 0.0, float)
    repeats = keys.get("num_repeats", 1, int)
    return folder(root, captions, SUFFIXES, repeats=repeats, **shape)


def _buckets(area: int, step: int, keys: Keys) -> list[list[int]]:
    """Return kohya's bucket shapes of an area, one for each side that is a multiple of the step."""
    square = max(step, int(area**0.5) // step * step)
    least = min(square, max(step, keys.get("min_bucket_reso", 256, int) // step * step))
    most = max(square, -(-keys.get("max_bucket_reso", 1024, int) // step) * step)
    found = {(square, square)}
    for side in range(least, most + 1, step):
        other = min(most, area // side // step * step)
        if other >= least:
            found |= {(side, other), (other, side)}
    return sorted(map(list, found))


def flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a TOML without its sections, whose names kohya ignores."""
    flat: dict[str, Any] = {}
    for key, value in found.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat
