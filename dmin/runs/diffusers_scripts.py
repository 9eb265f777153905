"""diffusers' example scripts: their arguments, as saved by the tracker of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmin.runs import adapter, base_model, checkpoints, wording as say
from dmin.runs.files import Places
from dmin.runs.folders import IMAGES, add, bucket, drawn, folder, together
from dmin.runs.keys import Keys
from dmin.runs.trainer_tables import GIVEN, table
from dmin.runs.training_run import TrainingRun
from dmin.runtime.errors import DminError

CONFIGS = ("hparams.yml", "*/*/*/hparams.yml")  # output_dir/logs/TRACKER/TIME
IMAGE_FOLDER = "dmin.data.image_folder.ImageFolder"
FOLDERS = ("instance_data_dir", "train_data_dir", "dataset_name")


def recognises(found: Any) -> bool:
    """Return whether a file has the arguments of one of diffusers' scripts."""
    known = {"pretrained_model_name_or_path", "output_dir", "resolution"}
    return isinstance(found, Mapping) and known <= found.keys() and "network_module" not in found


def read(source: Path, found: Mapping[str, Any], places: Places) -> TrainingRun:
    """Read the arguments of a script."""
    run = TrainingRun("diffusers' scripts", source)
    keys = Keys(found, run)
    if keys.get("rank", kind=int) is None:
        raise adapter.refuse_whole(run, "no rank")
    base_model.take(run, places, keys.get("pretrained_model_name_or_path", kind=str))
    place = keys.get("output_dir", "", str)
    run.name, name = Path(place).name or "run", "pytorch_lora_weights.safetensors"
    root = places.seek(place, "output_dir")
    adapter.take(run, places, "output_dir", root, name, f"checkpoint-*/{name}")
    keys.weighted(keys.get("precondition_outputs", False, bool))
    if kind := keys.get("prediction_type", kind=str):
        base_model.predicts(keys, "prediction_type", kind)
    checkpoints.schedule(keys, "max_train_steps", "num_train_epochs")
    run.facts |= keys.known("learning_rate", "train_batch_size", "seed", "rank")
    parts = None if "data" in places.said else _folders(keys, places)
    keys.apply(table("diffusers_scripts", "arguments"))
    run.data = together(parts, run)
    return run


def _folders(keys: Keys, places: Places) -> dict[str, dict[str, Any]]:
    """Return the folder: with one prompt for all images (DreamBooth), or with captions."""
    run = keys.run
    key = next((each for each in FOLDERS if keys.get(each, kind=str)), None)
    if key in (None, "dataset_name"):
        raise DminError(
            f"{run.source}: its data are {key} = {keys.get('dataset_name')}, which is not a local "
            f"folder. Set data=hf_dataset data.path=… or data=image_folder data.root=…"
        )
    root = places.folder(keys.get(key, "", str), key)
    shape = bucket(keys.get("resolution", 512), False, 1, True, run)
    if not keys.get("center_crop", False, bool):
        keys.note(run.random, "center_crop", False, say.CROP)
    cut = keys.draw("center_crop", on=not keys.get("center_crop", False, bool))
    draws = {"flip": keys.draw("random_flip", 0.5), "crop": cut}
    repeats = keys.get("repeats", 1, int)
    keys.note(run.taken, key, root, f"data, {repeats} repeats")
    if key == "instance_data_dir":
        prompt = {"source": "text", "text": keys.get("instance_prompt", "", str)}
        part = folder(root, prompt, IMAGES, repeats=repeats, draws=draws, **shape)
    else:
        text = keys.get("edit_prompt_column", keys.get("caption_column", "text", str), str)
        part = {"_target_": IMAGE_FOLDER, "root": root, "text": text, "mode": "RGB", **shape}
        part |= drawn(draws) | _given(keys)
    parts: dict[str, dict[str, Any]] = {}
    add(parts, Path(root).name, part, run)
    return parts


def _given(keys: Keys) -> dict[str, Any]:
    """Return the column of second images, ``condition_image``, if the family has them."""
    columns = "original_image_column", "conditioning_image_column", "cond_image_column"
    key = next((key for key in columns if keys.get(key, kind=str)), None)
    if key is None or keys.run.family not in GIVEN:
        keys.refuse({say.CONTROL: " ".join(columns)})
        return {}
    keys.note(keys.run.taken, key, keys.get(key), "data.condition_image, a column of the metadata")
    return {"condition_image": keys.get(key)}
