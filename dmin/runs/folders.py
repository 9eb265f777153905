"""The data of a run, as settings of ``data``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmin.runs import wording as say
from dmin.runs.files import Places, spelled
from dmin.runs.keys import Keys
from dmin.runs.trainer_tables import GIVEN
from dmin.runs.training_run import Entry, TrainingRun, shown
from dmin.runtime.errors import DminError

_FOLDER = "dmin.data.training_folder.TrainingFolder"
_CAPTIONS = "dmin.data.captions.Captions"
_DRAWS = "dmin.data.captions.Draws"
MASKS = "dmin.data.masks.Masks"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


def folder(
    root: str,
    captions: Mapping[str, Any],
    suffixes: Sequence[str],
    *,
    repeats: float = 1.0,
    dropout: float | None = None,
    draws: Mapping[str, Any] | None = None,
    recursive: bool = False,
    leave: Sequence[str] = (),
    **shape: Any,
) -> dict[str, Any]:
    """Return the settings of one folder.

    Args:
        root: the folder.
        captions: settings of `Captions`.
        suffixes: of the files that the trainer reads as images.
        repeats: passes per epoch.
        dropout: fraction of passes without the caption, used by `together`; None: not given.
        draws: settings of `Draws` for what was random.
        recursive: whether subfolders are read.
        leave: endings of names of files that are not examples.
        shape: size and aspect, as `bucket` returns them.
    """
    return {
        "_target_": _FOLDER,
        "root": root,
        "captions": {"_target_": _CAPTIONS, **captions},
        "suffixes": list(suffixes),
        "recursive": recursive,
        "leave": list(leave),
        "repeats": repeats,
        **({} if dropout is None else {"dropout": dropout}),
        **drawn(draws or {}),
        "mode": "RGB",
        **shape,
    }


def drawn(draws: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of draws, if something was random."""
    if not any(draws.get(name) for name in ("flip", "crop", "lines", "shuffle", "drop")):
        return {}
    return {"draws": {"_target_": _DRAWS, **{k: v for k, v in draws.items() if v}}}


def bucket(size: Any, buckets: bool, step: int, upscale: bool, run: TrainingRun) -> dict[str, Any]:
    """Return the settings of size and aspect ratio of the images of a folder.

    Args:
        size: a number of pixels, or width and height, of which only the area matters.
        buckets: whether images keep approximately their aspect ratio.
        step: sides are multiples of it.
        upscale: whether small images are scaled up.
        run: for messages.

    Raises:
        DminError: it is not a size.
    """
    numbers = sides(size, run)
    if step < 1:
        raise DminError(f"{run.source}: sides of buckets in steps of {step}: 1 pixel at least.")
    side = round((numbers[0] * numbers[-1]) ** 0.5)
    if numbers[0] != numbers[-1] and not buckets:
        return {"size": side, "aspect": "buckets", "bucket_shapes": [numbers[::-1]]}
    settings: dict[str, Any] = {"size": side, "aspect": "buckets" if buckets else "square"}
    if buckets and not upscale:
        settings["upscale"] = False
    return settings | ({"bucket_step": step} if buckets else {})


def sides(size: Any, run: TrainingRun) -> list[int]:
    """Return the one or two numbers of a size: a number, ``512,768``, ``512x768`` or a list."""
    parts = re.split("[x,]", size.strip("()[] ")) if isinstance(size, str) else size
    try:
        numbers = [int(each) for each in (parts if isinstance(parts, list | tuple) else [parts])]
        if not 1 <= len(numbers) <= 2 or not all(0 < n <= 1 << 16 for n in numbers):
            raise ValueError
        return numbers
    except (ValueError, TypeError, OverflowError):
        raise DminError(
            f"{run.source}: resolution = {shown(size)}, which is not an image size (a number of "
            f"pixels, or width and height). Fix it in a copy of the file."
        ) from None


def ratios(side: int, aspects: Iterable[float], step: int) -> dict[str, Any]:
    """Return size and buckets of given aspect ratios.

    Args:
        side: of the square of the same area, in pixels.
        aspects: height divided by width.
        step: sides are rounded to multiples of it.
    """
    shapes = {
        tuple(max(step, round(each / step) * step) for each in (side * a**0.5, side / a**0.5))
        for a in aspects
    }
    return {"size": side, "aspect": "buckets", "bucket_shapes": sorted(map(list, shapes))}


def of_paths(paths: Iterable[str], places: Places, key: str) -> str:
    """Return the common folder of the images that a table names by path.

    Raises:
        DminError: there are none, or a path is neither absolute nor relative to the current folder.
    """
    found = {path: places.find(path, key).absolute() for path in paths}
    moved = [path for path, file in found.items() if path not in (str(file), spelled(file))]
    if moved or not found:
        raise DminError(
            f"{places.source}: {key} names {moved[0] if moved else 'no image'}, but images are "
            f"given by absolute paths or paths relative to the current folder: use those in a copy "
            f"of the file."
        )
    return spelled(Path(os.path.commonpath([file.parent for file in found.values()])))


def several_lines(root: Path) -> bool:
    """Return whether a caption file of a folder has several lines, each a caption of its own."""
    files = (file for file in root.rglob("*.txt") if file.is_file())
    return any(b"\n" in file.read_bytes().strip() for file in files)


def masks(keys: Keys, key: str, places: Places, **settings: Any) -> dict[str, Any]:
    """Return the settings of loss masks: the images' alpha channel, or a folder named by a key.

    Args:
        keys: of the folder of images.
        key: the key that names the folder of masks.
        places: finds the folder.
        settings: of `Masks`.
    """
    if keys.get("alpha_mask", False, bool):
        keys.note(keys.run.taken, "alpha_mask", True, "masks of the loss")
        return {"masks": {"_target_": MASKS, "alpha": True, **settings}}
    if not (path := keys.get(key, kind=str)):
        return {}
    found = places.folder(path, keys.name(key))
    keys.note(keys.run.taken, key, found, "masks of the loss")
    return {"masks": {"_target_": MASKS, "folder": found, **settings}}


def given(keys: Keys, key: str, places: Places, root: Path) -> dict[str, Any]:
    """Return ``condition_image``, the second image of each example, if the family has one.

    Args:
        keys: of the folder of images.
        key: the key that names the folder of second images, which have the same file names.
        places: finds the folder.
        root: the folder of images.
    """
    path = keys.get(key)
    if not path or keys.run.family not in GIVEN or not isinstance(path, str):
        keys.refuse({say.CONTROL: key})
        return {}
    found = Path(places.folder(path, keys.name(key)))
    keys.note(keys.run.taken, key, found, "data.condition_image")
    inside = found.is_relative_to(root)
    return {"condition_image": (found.relative_to(root) if inside else found).as_posix()}


def add(
    parts: dict[str, dict[str, Any]],
    name: str,
    part: Mapping[str, Any],
    run: TrainingRun,
    shapes: Sequence[Mapping[str, Any]] = ({},),
) -> None:
    """Add a folder to those of a run, once for each of its sizes.

    Args:
        parts: settings of the folders added before, by name.
        name: of the folder.
        part: its settings.
        run: gets an entry if the folder has no repeats and is left out.
        shapes: settings of each size.
    """
    if part.get("repeats", 1.0) <= 0:
        run.taken.append(Entry(name, part["repeats"], "repeats: never used, so left out"))
        return
    for shape in shapes:
        unique = f"{name}@{shape['size']}" if len(shapes) > 1 else name
        while unique in parts:
            unique += "'"
        parts[unique] = {**part, **shape}


def together(parts: Mapping[str, dict[str, Any]] | None, run: TrainingRun) -> dict[str, Any]:
    """Return the settings of all folders of a run as one dataset.

    Args:
        parts: settings of each, by name; None: the user names other data.
        run: gets ``noise.shapes=field`` if the images have several shapes.

    Raises:
        DminError: there are no folders.
    """
    if parts is None:
        run.taken.append(Entry("data", "not the run's", "set by you"))
        return {}
    if not parts:
        raise DminError(f"{run.source} does not name a folder of training images.")
    _dropout(parts, run)
    approximated = sorted({entry.key.rpartition(".")[2] for entry in run.random})
    run.model["empty_captions"] = "keep"  # trainers use images without a caption
    first = next(iter(parts.values()))
    sizes = {(part.get("size"), part.get("aspect")) for part in parts.values()}
    if len(sizes) > 1 or any(aspect != "square" for _, aspect in sizes):
        run.noise["shapes"] = "field"
        meaning = "noise.shapes=field, the same noise at the same place"
        run.taken.append(Entry("images of several shapes", "yes", meaning))
    pictures = ("size", "aspect", "bucket_step", "bucket_shapes", "bucket_ratio", "upscale", "mode")
    return {
        "_target_": "dmin.data.training_folder.Together",
        "datasets": {
            name: {key: value for key, value in part.items() if key != "dropout"}
            for name, part in parts.items()
        },
        "approximated": approximated,
        **{name: first[name] for name in pictures if name in first},
    }


def _dropout(parts: Mapping[str, dict[str, Any]], run: TrainingRun) -> None:
    """Set model.prompt_dropout if all folders with a caption dropout agree; else use draws."""
    shares = {part["dropout"] for part in parts.values() if "dropout" in part}
    before = run.model.pop("prompt_dropout", 0.0) if shares else None
    if len(shares) > 1:
        run.random.append(Entry("caption_dropout_rate", sorted(shares), say.DROPOUT))
        run.drawn.add("caption_dropout_rate")
        for part in parts.values():
            part["draws"] = {"_target_": _DRAWS, **part.get("draws", {})}
            part["draws"]["dropout"] = part.get("dropout", before)
    elif share := sum(shares):
        run.model["prompt_dropout"] = share
        if share != before:
            run.taken.append(Entry("caption_dropout_rate", share, "model.prompt_dropout"))
