"""A LoRA of kohya sd-scripts without its config: the run as described by the file's header."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmin.runs import adapter, base_model, checkpoints, kohya, wording as say
from dmin.runs.files import Places
from dmin.runs.folders import together
from dmin.runs.keys import Keys
from dmin.runs.trainer_tables import families, table
from dmin.runs.training_run import TrainingRun
from dmin.runtime.errors import DminError

CONFIGS = ("*.safetensors",)
# Name in the header → option of the trainer, where they differ.
NAMES = {
    "sd_model_name": "pretrained_model_name_or_path",
    "vae_name": "vae",
    "debiased_estimation": "debiased_estimation_loss",
}


def recognises(found: Any) -> bool:
    """Return whether kohya's trainers wrote a header."""
    return isinstance(found, Mapping) and "ss_network_module" in found


def read(source: Path, found: Mapping[str, Any], places: Places) -> TrainingRun:
    """Read a run from the header of a file."""
    run = TrainingRun("kohya sd-scripts, by the file's header", source)
    told = {k[3:]: v for k, v in found.items() if k.startswith("ss_") and v not in ("None", "")}
    keys = Keys({NAMES.get(key, key): value for key, value in told.items()}, run)
    version = keys.get("base_model_version", "", str)
    known = families("kohya", "versions")
    kind = next((name for name in known if version.startswith(name)), version)
    base = keys.get("pretrained_model_name_or_path", kind=str)
    base_model.take(run, places, base, kind, known)
    kohya.loss(keys, _predicted(version, str(found.get("modelspec.prediction_type", ""))))
    run.name = keys.get("output_name", source.stem, str)
    adapter.take(run, places, "run", source.parent, source.name, f"{source.stem}-*.safetensors")
    checkpoints.schedule(keys, "max_train_steps")
    run.facts |= keys.known("network_dim", "network_alpha", "steps", "epoch", "learning_rate")
    parts = None
    if "data" not in places.said:
        parts = kohya.of_datasets(_datasets(keys, places), keys, places)
    keys.skip(table("kohya", "folders").inert)
    keys.skip(table("kohya", "header").inert)
    keys.apply(table("kohya", "options"))
    run.data = together(parts, run)
    return run


def _predicted(version: str, told: str) -> str | None:
    """Return the prediction type: v if ``v`` is a part of either name; None if unknown."""
    if "v" in (*version.split("_"), *told.split("_")):
        return "v_prediction"
    return "epsilon" if told == "epsilon" or version.startswith("sd_v") else None


def _datasets(keys: Keys, places: Places) -> Keys:
    """Return the datasets in the form of a dataset config."""
    found = _json(keys, "datasets")
    counted = _json(keys, "tag_frequency")
    if found is None:  # numbered folders; their settings are options
        folders = _json(keys, "dataset_dirs")
        entries = folders.items() if isinstance(folders, dict) else ()
        subsets = [
            {"image_dir": name, "class_tokens": name.partition("_")[2] or None, **_table(entry)}
            for name, entry in entries
        ]
        found = [{"subsets": subsets, "bucket_info": _json(keys, "bucket_info")}]
        if _json(keys, "reg_dataset_dirs"):
            keys.note(keys.run.other, "reg_dataset_dirs", "present", say.PRIOR)
    datasets = []
    for dataset in Keys({"datasets": found}, keys.run).each("datasets"):
        buckets = _table(dataset.inside("bucket_info").get("buckets"))
        shapes = [_table(each).get("resolution") for each in buckets.values()]
        told = {"bucket_shapes": [shape[::-1] for shape in shapes if isinstance(shape, list)]}
        told |= {key: dataset.get(key) for key in ("resolution", "enable_bucket")}
        subsets = [_subset(each, _table(counted), places) for each in dataset.each("subsets")]
        told = {key: value for key, value in told.items() if value not in (None, [])}
        datasets.append({**told, "subsets": subsets})
    return Keys({"datasets": datasets}, keys.run)


def _subset(subset: Keys, counted: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """Return a folder's options; its caption extension is that whose tags match the header."""
    told = {key: value for key, value in subset.values.items() if value is not None}
    if "n_repeats" in told:
        told["num_repeats"] = told.pop("n_repeats")
    number = told.pop("img_count", None)
    if not subset.get("is_reg", False, bool) and "metadata_file" not in told:
        name = subset.get("image_dir", "", str)
        root = Path(places.folder(name, subset.name("image_dir")))
        told["caption_extension"] = _extension(subset, root, counted.get(name), number)
    return told


def _table(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _extension(subset: Keys, root: Path, tags: Any, number: Any) -> str:
    from dmin.data.captions import Captions  # imports torch

    files = sorted(file.name for file in root.iterdir() if file.is_file())
    images = [name for name in files if Path(name).suffix.lower() in kohya.SUFFIXES]
    tokens = subset.get("class_tokens", kind=str)
    for extension in (".caption", ".txt"):
        missing: Any = "text" if tokens else "empty"
        read = Captions("files", [extension], "first", missing=missing, text=tokens)
        captions = read.read(root, images, files).values()
        words = [part.strip().lower() for caption in captions for part in caption.split(",")]
        found = Counter(word for word in words if word)
        if number in (None, len(images)) and found == tags:
            return extension
    raise DminError(
        f"{root} does not hold the images and captions that {subset.run.source} was trained on: "
        f"its header counts {number} images and different tags. Give the right folder by "
        f"run.root=…, or set data=training_folder data.root=… to use this one."
    )


def _json(keys: Keys, key: str) -> Any:
    text = keys.get(key, kind=str)
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DminError(
            f"{keys.run.source}: ss_{key} in its header is not JSON ({error})."
        ) from error
