"""A folder of images, with captions and labels beside them."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dmin.data.base import Example
from dmin.errors import DminError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageFolder:
    """The images of a folder, ordered by name; an image's id is its path below the folder.

    Captions and labels come from ``metadata.jsonl`` or ``metadata.csv`` with a ``file_name`` column
    (as in Hugging Face's imagefolder): ``text`` becomes the caption, the column ``label`` names the
    label, all others travel with the example. Without such a file the name of the sub-folder, if
    any, is the label.

    Args:
        root: the folder.
        size: height and width to resize and centre-crop to; None takes images as they are.
        mode: ``RGB`` or ``L`` (grey) for all images; None keeps grey ones grey and turns all others
            into RGB.
        label: column of the label.

    Raises:
        DminError: no such folder, no images, an image named in the metadata is missing, or an
            image cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        size: int | None = None,
        mode: Literal["RGB", "L"] | None = "RGB",
        label: str = "label",
    ) -> None:
        self.root = Path(root)
        self.size = size
        self.mode = mode
        if not self.root.is_dir():
            raise DminError(f"data.root={root}: no such folder. Give a folder of images.")
        rows = _metadata(self.root)
        files = sorted(rows) if rows is not None else _images(self.root)
        if not files:
            raise DminError(
                f"data.root={root} holds no images ({', '.join(SUFFIXES)}). Give another folder."
            )
        missing = [file for file in files if not (self.root / file).is_file()]
        if missing:
            raise DminError(
                f"the metadata of {root} names {len(missing)} image(s) that are not there, such as "
                f"{missing[0]}. Restore them or take their lines out."
            )
        self.files = files
        self._rows = [self._describe(file, rows, label) for file in files]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        """Return one example."""
        label, caption, metadata = self._rows[index]
        return Example(self.files[index], self._read(self.files[index]), label, caption, metadata)

    def describe(self) -> dict[str, Any]:
        """Return names, labels, captions and a digest of the bytes of every file."""
        digest = hashlib.sha256()
        for file, row in zip(self.files, self._rows, strict=True):
            content = hashlib.sha256((self.root / file).read_bytes()).hexdigest()
            digest.update(json.dumps([file, content, *row], sort_keys=True).encode())
        return {
            "name": type(self).__name__,
            "examples": len(self),
            "size": self.size,
            "mode": self.mode,
            "content": digest.hexdigest()[:16],
        }

    def _describe(
        self, file: str, rows: dict[str, dict[str, Any]] | None, label: str
    ) -> tuple[int | str | None, str | None, dict[str, Any]]:
        if rows is None:
            folder = Path(file).parent.as_posix()
            return (None if folder == "." else folder), None, {}
        row = dict(rows[file])
        found = row.pop(label, None)
        return found, row.pop("text", None), row

    def _read(self, file: str) -> Tensor:
        path = self.root / file
        try:
            with Image.open(path) as opened:
                mode = self.mode or ("L" if opened.mode in ("1", "L") else "RGB")
                image = ImageOps.exif_transpose(opened).convert(mode)
        except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
            raise DminError(
                f"{path} cannot be read as an image ({error}). Mend it or take it out."
            ) from error
        if self.size is not None:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.LANCZOS)
        pixels = np.asarray(image, dtype=np.float32) / 255
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(pixels))


def save_images(
    folder: str | Path,
    images: Tensor,
    names: list[str],
    rows: list[dict[str, Any]],
    append: bool = False,
) -> None:
    """Write images and ``metadata.jsonl`` so that :class:`ImageFolder` reads them back.

    Args:
        folder: made if it is not there.
        images: ``[n, C, H, W]`` in [0, 1]; written as 8-bit PNG.
        names: file names, ending in ``.png``.
        rows: metadata of each image.
        append: add to the metadata that is there instead of replacing it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for image, name in zip(images, names, strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(folder / name)
    lines = [json.dumps({"file_name": name, **row}) for name, row in zip(names, rows, strict=True)]
    with (folder / "metadata.jsonl").open("a" if append else "w") as file:
        file.write("\n".join(lines) + "\n")


def _images(root: Path) -> list[str]:
    found = (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(p.relative_to(root).as_posix() for p in found)


def _metadata(root: Path) -> dict[str, dict[str, Any]] | None:
    """Return the metadata rows by file name, or None when there is no metadata file."""
    jsonl, table = root / "metadata.jsonl", root / "metadata.csv"
    if jsonl.is_file():
        rows = [
            _json_line(jsonl, n, line) for n, line in enumerate(jsonl.open(), 1) if line.strip()
        ]
        path = jsonl
    elif table.is_file():
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        path = table
    else:
        return None
    by_name: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        name = row.pop("file_name", None)
        if not isinstance(name, str):
            raise DminError(f"{path}, row {number}: no file_name. Every row must name its image.")
        if name in by_name:
            raise DminError(f"{path}, row {number}: {name} is named twice. Keep one of the rows.")
        by_name[name] = row
    return by_name


def _json_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DminError(f"{path}, line {number} is not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise DminError(f"{path}, line {number} is not a JSON object.")
    return row
