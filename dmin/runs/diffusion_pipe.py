"""diffusion-pipe: a TOML of model and optimiser, and one of folders; a run has copies of both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmin.runs import adapter, base_model, checkpoints, wording as say
from dmin.runs.files import Places, load
from dmin.runs.folders import IMAGES, add, folder, given, masks, ratios, sides, together
from dmin.runs.keys import Keys
from dmin.runs.trainer_tables import families, table
from dmin.runs.training_run import TrainingRun, shown
from dmin.runtime.errors import DminError

CONFIGS = ("*.toml",)
STEP = 16  # sides are multiples of it


def recognises(found: Any) -> bool:
    """Return whether a config is one of diffusion-pipe's."""
    model = found.get("model") if isinstance(found, Mapping) else None
    return isinstance(model, Mapping) and "type" in model and "dataset" in found


def read(source: Path, found: Mapping[str, Any], places: Places) -> TrainingRun:
    """Read a config of diffusion-pipe."""
    run = TrainingRun("diffusion-pipe", source)
    keys = Keys(found, run)
    model, of_adapter = keys.inside("model"), keys.inside("adapter")
    if not of_adapter.values:
        raise adapter.refuse_whole(run, "no [adapter]")
    base = model.get("checkpoint_path", model.get("diffusers_path", kind=str), str)
    base_model.take(run, places, base, model.get("type"), families("diffusion_pipe"))
    if run.family == "stable_diffusion_xl":
        run.model["sizes_from"] = "cut"
        meaning = "captions were padded to the longest of a batch; here to 77 tokens"
        model.note(run.random, "type", "sdxl", meaning)
        kind = "v_prediction" if model.get("v_pred", False, bool) else "epsilon"
        base_model.predicts(model, "v_pred", kind)
    model.refuse({say.CUT_OFF: "max_t"}, off=(1, "1"))
    root = _folder_of_run(keys, places)
    run.name = root.name if root else "run"
    way = "epoch" if root and any(root.glob("epoch*/*.safetensors")) else "step"
    adapter.take(run, places, "output_dir", root, "adapter", f"{way}*/*.safetensors")
    known = ("constant_with_warmup",)
    checkpoints.schedule(keys, "max_steps", warmup="warmup_steps", known=known)
    run.facts |= keys.known("micro_batch_size_per_gpu")
    parts = None if "data" in places.said else _folders(keys, places)
    for name, part in {"options": keys, "model": model, "adapter": of_adapter}.items():
        part.apply(table("diffusion_pipe", name))
    run.data = together(parts, run)
    return run


def _folder_of_run(keys: Keys, places: Places) -> Path | None:
    """Return the folder of the saved files: that of the config's copy, or the only run's."""
    beside = keys.run.source.parent
    if any(beside.glob("epoch*/*.safetensors")) or any(beside.glob("step*/*.safetensors")):
        return beside
    root = places.seek(keys.get("output_dir", kind=str), "output_dir")
    found = sorted({file.parents[1] for file in root.glob("*/*/*.safetensors")}) if root else []
    if len(found) > 1 and "adapter" not in places.said:
        names = ", ".join(str(each) for each in found[:5])
        raise DminError(
            f"{keys.run.source}: output_dir has several runs ({names}). Choose one: run={found[-1]}"
        )
    return found[-1] if found else root


def _folders(keys: Keys, places: Places) -> dict[str, dict[str, Any]]:
    """Return the folders of the dataset, once for each resolution."""
    run, parts = keys.run, dict[str, dict[str, Any]]()
    said = keys.get("dataset", "", str)
    copied = run.source.parent / Path(said).name
    file = copied if said and copied.is_file() else places.find(said, "dataset")
    top = Keys(load(file), run, "dataset")
    for own in top.each("directory"):
        each = Keys({**top.values, **own.values}, run, own.where)
        root = Path(places.folder(each.get("path", "", str), each.name("path")))
        if archives := sorted(root.glob("*.tar")):
            raise DminError(
                f"{run.source}: {archives[0]} is an archive of images, which is not read. Unpack "
                f"it there (tar -xf) and move the archive away, or remove that directory from a "
                f"copy of the file."
            )
        known = len(each.run.random)
        shapes, captions = _shapes(each), _captions(each, root)
        more = {"repeats": each.get("num_repeats", 1.0, float)} | masks(each, "mask_path", places)
        shuffled = [each.draw(key) for key in ("shuffle_tags", "cache_shuffle_num")]
        more |= given(each, "control_path", places, root)
        mark = each.get("cache_shuffle_delimiter", ", ", str)
        more["draws"] = {
            "lines": each.draw("path", on=len(each.run.random) > known),
            **{"shuffle": any(shuffled), "separator": mark, "joint": mark},
        }
        part = folder(root.as_posix(), captions, IMAGES, **more)
        each.note(run.taken, "path", root.name, f"data, {part['repeats']:g} repeats")
        each.apply(table("diffusion_pipe", "directory"))
        add(parts, root.name, part, run, shapes)
    return parts


def _captions(each: Keys, root: Path) -> dict[str, Any]:
    """Return settings of captions: from ``captions.json``, else from files."""
    missing = "drop" if each.get("skip_empty_caption", True, bool) else "empty"
    told = {"missing": missing, "prefix": each.get("caption_prefix", "", str)}
    listed = root / "captions.json"
    if not listed.is_file():
        return {"extensions": [".txt"], **told}
    captions = load(listed)
    if isinstance(captions, dict) and any(len(c) > 1 for c in captions.values() if c):
        meaning = "each caption of an image was trained on; here the first"
        each.note(each.run.random, "path", listed.name, meaning)
    return {"source": "table", "table": listed.as_posix(), **told}


def _shapes(each: Keys) -> list[dict[str, Any]]:
    """Return the buckets of each resolution: by aspect ratio, or as listed."""
    run = each.run
    if listed := each.get("size_buckets", kind=list):
        pairs = [sides(b[:2] if isinstance(b, list) else b, run) for b in listed]
        shapes = [[pair[-1], pair[0]] for pair in pairs]
        area = max(height * width for height, width in shapes)
        return [{"size": round(area**0.5), "aspect": "buckets", "bucket_shapes": shapes}]
    found = [1.0]
    if each.get("enable_ar_bucket", False, bool):
        found = _aspects(each)
    sizes = [sides(size, run) for size in each.get("resolutions", [512], list)]
    return [ratios(round((s[0] * s[-1]) ** 0.5), [1 / a for a in found], STEP) for s in sizes]


def _aspects(each: Keys) -> list[float]:
    """Return the aspect ratios (width divided by height) of the buckets."""
    listed = each.get("ar_buckets", kind=list)
    try:
        if listed:
            pairs = [a if isinstance(a, list) else [a, 1] for a in listed]
            found = [float(width) / float(height) for width, height in pairs]
        else:
            least, most = each.get("min_ar", 0.5, float), each.get("max_ar", 2.0, float)
            count = each.get("num_ar_buckets", 7, int)
            steps = [n / max(1, count - 1) for n in range(count)]
            found = [least * (most / least) ** step for step in steps]
        if not found or not all(0.01 < a < 100 for a in found) or len(found) > 1000:
            raise ValueError
        return found
    except (TypeError, ValueError, ArithmeticError):
        told = shown(listed or each.known("min_ar", "max_ar", "num_ar_buckets"))
        raise DminError(
            f"{each.run.source}: {each.name('ar_buckets')} = {told} contains no valid aspect "
            f"ratios. Fix it in a copy of the file."
        ) from None
