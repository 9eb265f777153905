"""musubi-tuner: a TOML of options, and one of data sets (folders)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmin.runs import adapter, base_model, checkpoints, wording as say
from dmin.runs.files import Places, load
from dmin.runs.folders import add, bucket, folder, given, of_paths, sides, together
from dmin.runs.keys import Keys
from dmin.runs.kohya import SUFFIXES, flat
from dmin.runs.trainer_tables import families, table
from dmin.runs.training_run import TrainingRun
from dmin.runtime.errors import DminError

CONFIGS = ("*.toml",)
STEP = 16  # sides are multiples of it


def recognises(found: Any) -> bool:
    """Return whether a config is one of musubi-tuner's."""
    return isinstance(found, Mapping) and {"dit", "dataset_config"} <= flat(found).keys()


def read(source: Path, found: Mapping[str, Any], places: Places) -> TrainingRun:
    """Read a config of musubi-tuner."""
    run = TrainingRun("musubi-tuner", source)
    keys = Keys(flat(found), run)
    base, module = keys.get("dit", kind=str), keys.get("network_module")
    base_model.take(run, places, base, module, families("musubi"))
    name = run.name = keys.get("output_name", "last", str)
    root = places.seek(keys.get("output_dir", ".", str), "output_dir")
    adapter.take(run, places, "output_dir", root, f"{name}.safetensors", f"{name}-*.safetensors")
    checkpoints.schedule(keys, "max_train_steps", "max_train_epochs")
    run.facts |= keys.known("network_dim", "network_alpha", "seed")
    parts = None if "data" in places.said else _folders(keys, places)
    keys.apply(table("musubi", "options"))
    run.data = together(parts, run)
    return run


def _folders(keys: Keys, places: Places) -> dict[str, dict[str, Any]]:
    """Return the folders of the datasets, by name."""
    run, parts = keys.run, dict[str, dict[str, Any]]()
    config = Keys(load(places.find(keys.get("dataset_config", "", str), "dataset_config")), run)
    general = config.inside("general")
    for own in config.each("datasets"):
        each = Keys({**general.values, **own.values}, run, own.where)
        where, captions = _images(each, places)
        size, small = each.get("resolution", [960, 544]), each.get("bucket_no_upscale", False, bool)
        shape = bucket(size, each.get("enable_bucket", False, bool), STEP, not small, run)
        if "bucket_step" in shape and not small:
            listed = _buckets(math.prod((sides(size, run) * 2)[:2]))
            shape |= {"bucket_shapes": listed, "bucket_ratio": "width/height"}
        repeats = each.get("num_repeats", 1, int)
        deep = "table" in captions
        more = {"recursive": deep, "repeats": repeats}
        more |= given(each, "control_directory", places, where)
        key = "image_jsonl_file" if deep else "image_directory"
        each.note(run.taken, key, where.name, f"data, {repeats} repeats")
        part = folder(where.as_posix(), captions, SUFFIXES, **more, **shape)
        add(parts, where.name, part, run)
        each.apply(table("musubi", "datasets"))
    return parts


def _images(each: Keys, places: Places) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a dataset's images, and the settings of its captions."""
    if listed := each.get("image_jsonl_file", kind=str):
        from dmin.data.metadata import read_table  # imports torch

        file, key = places.folder(listed, each.name("image_jsonl_file")), "image_path"
        rows = read_table(Path(file), key)
        root = of_paths(rows, places, each.name("image_jsonl_file"))
        if any(str(name).startswith("control_path") for row in rows.values() for name in row):
            meaning = f"{say.CONTROL}: set their folder, control_directory, in a copy"
            each.note(each.run.other, "image_jsonl_file", "control_path", meaning)
        told: dict[str, Any] = {
            "source": "table",
            "table": file,
            "key": key,
            "columns": ["caption"],
        }
        return Path(root), {**told, "missing": "drop"}
    path, ending = (each.get(k, "", str) for k in ("image_directory", "caption_extension"))
    if not path or not ending.strip("."):
        raise DminError(
            f"{each.run.source}: {each.where} needs image_directory and caption_extension, or "
            f"image_jsonl_file. Videos are not read: remove that data set from a copy of the file."
        )
    told = {"extensions": [f".{ending.lstrip('.')}"], "missing": "drop"}
    return Path(places.folder(path, each.name("image_directory"))), told


def _buckets(area: int) -> list[list[int]]:
    """Return the bucket shapes of an area: one side from half the square's to one step above."""
    side, found = math.isqrt(area), set[tuple[int, int]]()
    for short in range(max(STEP, side // 2 // STEP * STEP), side + STEP, STEP):
        other = area // short // STEP * STEP
        found |= {(short, other), (other, short)} if other else set()
    return sorted(map(list, found))
