"""Drawings of animals and plants by two design houses, from their packages on npm."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from dmin.data.image_folder import ImageFolder
from dmin.runtime.escape import write_csv

VERSION, CATEGORY, HELD_OUT = "16.0.0", "Animals & Nature", 50
ARTISTS = {"google": "Noto", "twitter": "Twemoji"}
DIGESTS = {  # SHA-256 of the packages
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}


def package(hand: str, folder: Path) -> Path:
    """Return the package of a house, fetched if it is not in the folder, with its digest checked.

    Raises:
        SystemExit: npm is not there, or the package is another.
    """
    name = f"emoji-datasource-{hand}"
    file = folder / f"{name}-{VERSION}.tgz"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        if shutil.which("npm") is None:
            address = f"https://registry.npmjs.org/{name}/-/{file.name}"
            raise SystemExit(f"No npm here. Fetch {address} (some 70 MB) into {folder}.")
        line = ["npm", "pack", f"{name}@{VERSION}", "--silent"]
        subprocess.run(line, cwd=folder, check=True)
    if hashlib.sha256(file.read_bytes()).hexdigest() != DIGESTS[hand]:
        raise SystemExit(f"{file} is not {name} {VERSION}: its digest differs. Delete it.")
    return file


def subjects(packed: tarfile.TarFile) -> list[dict[str, Any]]:
    """Return what both houses have drawn, of one category."""
    told = packed.extractfile("package/emoji.json")
    assert told is not None
    drawn = [f"has_img_{hand}" for hand in ARTISTS]
    listed = [e for e in json.load(told) if e["category"] == CATEGORY and all(e[d] for d in drawn)]
    return sorted(listed, key=lambda e: e["image"])


def held_out(listed: list[dict[str, Any]]) -> set[str]:
    """Return the subjects that no house's drawing is trained on, of each kind in proportion."""
    kinds = defaultdict(list)
    for entry in listed:
        kinds[entry["subcategory"]].append(entry["image"])
    drawn = random.Random(0)
    ranked = [
        ((place + 0.5) / len(images), image)
        for images in kinds.values()
        for place, image in enumerate(drawn.sample(images, len(images)))
        if len(images) > 1
    ]
    return {image for _, image in sorted(ranked)[:HELD_OUT]}


def drawings(place: Path, packages: Path) -> dict[str, ImageFolder]:
    """Return the drawings to train on and those held out, at 32 × 32 on white.

    Labels are the kind of subject (bird, flower), captions its name; neither tells the artist,
    which is in the metadata.
    """
    if not place.is_dir():
        partial = place.with_name(f"{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        _unpack(partial, packages)
        partial.rename(place)
    return {split: ImageFolder(place / split, size=32) for split in ("train", "heldout")}


def _unpack(place: Path, packages: Path) -> None:
    rows = defaultdict(list)
    for hand, artist in ARTISTS.items():
        with tarfile.open(package(hand, packages)) as packed:
            listed = subjects(packed)
            out = held_out(listed)
            for entry in listed:
                split = "heldout" if entry["image"] in out else "train"
                name = f"{artist.lower()}-{entry['image']}"
                file = packed.extractfile(f"package/img/{hand}/64/{entry['image']}")
                assert file is not None
                (place / split).mkdir(parents=True, exist_ok=True)
                (place / split / name).write_bytes(file.read())
                row = {"file_name": name, "text": entry["short_name"].replace("_", " ")}
                row |= {"label": entry["subcategory"].partition("-")[2], "artist": artist}
                rows[split].append(row)
    for split, found in rows.items():
        write_csv(place / split / "metadata.csv", found)
