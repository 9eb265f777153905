"""ai-toolkit: one YAML or JSON file of a job, including its data sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmin.runs import adapter, base_model, checkpoints, wording as say
from dmin.runs.files import Places, load
from dmin.runs.folders import add, bucket, folder, given, masks, of_paths, together
from dmin.runs.keys import Keys
from dmin.runs.trainer_tables import FLOWS, families, table
from dmin.runs.training_run import TrainingRun
from dmin.runtime.errors import DminError

OLDER = {"v2": "sd2", "v3": "sd3", "xl": "sdxl"}  # as in ``is_xl``
CONFIGS = ("*.yaml", "*.yml", "*.json")
PROCESSES = ("sd_trainer", "ui_trainer", "diffusion_trainer")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def recognises(found: Any) -> bool:
    """Return whether a config is one of ai-toolkit's jobs."""
    return isinstance(found, Mapping) and found.get("job") == "extension" and _process(found) != {}


def _process(found: Mapping[str, Any]) -> dict[str, Any]:
    config = found.get("config")
    several = config.get("process") if isinstance(config, Mapping) else None
    each = [p for p in several if isinstance(p, dict)] if isinstance(several, list) else []
    return next((p for p in each if p.get("type") in PROCESSES), {})


def read(source: Path, found: Mapping[str, Any], places: Places) -> TrainingRun:
    """Read a job of ai-toolkit."""
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
    base_model.take(run, places, model.get("name_or_path", kind=str), kind, families("ai_toolkit"))
    if run.family == "stable_diffusion_xl":
        run.model["sizes_from"] = "cut"
    _loss(train, model, run)
    quantised = model.get("quantize", False, bool)
    if quantised and run.family not in FLOWS:  # which of these it does that to is not known
        model.rounded("quantize", quantised, {})
    model.values["qtype"] = model.get("qtype", "qfloat8", str) if quantised else None
    model.values.setdefault("quantize_te", quantised)
    place = keys.get("training_folder", "output", str).replace("[name]", name)
    folder_of_run = places.seek(f"{place}/{name}", "training_folder") or source.parent
    last, way = f"{name}.safetensors", f"{name}_*.safetensors"
    adapter.take(run, places, "training_folder", folder_of_run, last, way)
    checkpoints.schedule(train, "steps", known=("constant",))
    run.facts |= train.known("batch_size", "lr")
    parts = None if "data" in places.said else _folders(keys, places, train)
    for name, part in {"process": keys, "train": train, "model": model}.items():
        part.apply(table("ai_toolkit", name))
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
    v = model.get("is_v_pred", False, bool)
    base_model.predicts(model, "is_v_pred", "v_prediction" if v else "epsilon")
    if v:
        train.refuse({say.WEIGHTS: "min_snr_gamma"})  # with v-prediction, it uses epsilon's weights


def _folders(keys: Keys, places: Places, train: Keys) -> dict[str, dict[str, Any]]:
    run, parts = keys.run, dict[str, dict[str, Any]]()
    for each in keys.each("datasets"):
        key = "folder_path" if each.get("folder_path") else "dataset_path"
        path = each.get(key, "", str).replace("[name]", run.name)
        if each.get("is_reg", False, bool):
            each.note(run.other, "is_reg", path, say.PRIOR)
            continue
        root = Path(places.folder(path, each.name(key)))
        captions = _captions(each, keys, train)
        if not root.is_dir():
            captions |= {"source": "table", "table": root.as_posix(), "missing": "drop"}
            root = Path(_of_table(root, each, key, places))
        sizes = each.get("resolution", 512)
        whole = each.get("buckets", True, bool) and not each.get("square_crop", False, bool)
        step = 32 if run.family in ("flux", "flux_kontext", "stable_diffusion_3") else 16
        shapes = [
            bucket(size, whole, step, False, run)
            for size in (sizes if isinstance(sizes, list) and sizes else [sizes])
        ]
        of_masks = {
            "invert": each.get("invert_mask", False, bool),
            "least": each.get("mask_min_value", 0.0, float),
            "proportion": True,
            "normalised": True,
        }
        more = {"repeats": each.get("num_repeats", 1, int), "leave": ("_controls/",)}
        more["background"] = None
        rate = "token_dropout_rate"
        more["draws"] = {
            "flip": each.draw("flip_x", 0.5),
            "crop": each.draw("random_crop"),
            "shuffle": each.draw("shuffle_tokens"),
            "drop": each.draw(rate, each.get(rate, 0.0, float)),
            **{"spare": each.get("keep_tokens", 0, int), "joint": ","},
        }
        more["dropout"] = each.get("caption_dropout_rate", 0.0, float)
        more |= masks(each, "mask_path", places, **of_masks)
        more |= given(each, "control_path", places, root)
        part = folder(root.as_posix(), captions, SUFFIXES, recursive=True, **more)
        each.randoms({"masks were blurred a little; here sharp": "mask_path alpha_mask"})
        each.note(run.taken, key, root.name, f"data, {part['repeats']:g} repeats")
        each.apply(table("ai_toolkit", "datasets"))
        add(parts, root.name, part, run, shapes)
    return parts


def _of_table(file: Path, each: Keys, key: str, places: Places) -> str:
    """Return the folder of the images in a table of captions."""
    found = load(file)
    if not isinstance(found, dict) or not all(isinstance(e, dict) for e in found.values()):
        raise DminError(f"{each.run.source}: {each.name(key)} = {file} is not a table of captions.")
    bare = [path for path, entry in found.items() if not entry.get("caption")]
    if bare and each.get("default_caption"):
        raise DminError(
            f"{each.run.source}: {bare[0]} of {file} has no caption, and default_caption does not "
            f"apply to it: write the caption into a copy of the table."
        )
    return of_paths(found, places, each.name(key))


def _captions(each: Keys, keys: Keys, train: Keys) -> dict[str, Any]:
    """Return settings of captions: whole files, split at commas and joined again."""
    trigger = each.get("trigger_word", keys.get("trigger_word", kind=str), str)
    if train.get("unload_text_encoder", False, bool):
        each.note(each.run.taken, "unload_text_encoder", True, "every caption was the trigger word")
        return {"source": "text", "text": trigger or ""}
    default = each.get("default_caption", kind=str)
    extension = each.get("caption_ext", ".txt", str).lstrip(".")
    return {
        "extensions": [f".{extension}"],
        "missing": "text" if default else "empty",
        "empty_is_missing": bool(default),
        "text": default,
        "rejoin": [",", ", "],
        "replace": {"[trigger]": trigger or "", "[name]": trigger or ""},
        "trigger": trigger,
    }
