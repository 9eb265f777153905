"""Masks of the loss in files beside images, as trainers read them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torch import Tensor

from dmin.data.pixels import Pixels
from dmin.data.survey import read_bytes
from dmin.runtime.errors import DminError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Masks:
    """Where the masks of images are, and what is made of them: white counts, black does not.

    Args:
        folder: holds a mask of the same stem for each image; None: they stand beside the images.
        suffix: behind the stem of an image, such as ``-masklabel.png``; None: any image's.
        required: every image must have one. Otherwise one without counts everywhere alike.
        invert: black counts instead.
        least: what black counts: grey that is darker, or all grey in proportion.
        proportion: the latter.
        normalised: divide each mask by its mean, so that the loss is the mean over what counts.
    """

    folder: str | Path | None = None
    suffix: str | None = None
    required: bool = False
    invert: bool = False
    least: float = 0.0
    proportion: bool = False
    normalised: bool = False

    def __post_init__(self) -> None:
        """Refuse what says nothing.

        Raises:
            DminError: neither a folder nor a suffix is named, or the folder is not there.
        """
        if self.folder is None and self.suffix is None:
            raise DminError("data.masks: name a folder of masks, or the suffix of those beside.")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise DminError(f"data.masks.folder={self.folder}: no such folder.")
        if not 0 <= self.least <= 1:
            raise DminError(f"data.masks.least={self.least}: give a number from 0 to 1.")

    def find(self, root: Path, images: Sequence[str]) -> dict[str, Path]:
        """Return the mask of each image that has one.

        Args:
            root: the folder of the images.
            images: their paths below it.

        Raises:
            DminError: one has none, and must have one; or all of them have none.
        """
        found = {image: file for image in images if (file := self._of(root, image)) is not None}
        without = [image for image in images if image not in found]
        if not found or (without and self.required):
            raise DminError(
                f"{len(without)} of the {len(images)} images of {root} have no mask in "
                f"{self.folder or root}: {', '.join(without[:3])}. Give them masks (white: all of "
                f"it counts), or set data.masks=null."
            )
        return found

    def content(self, file: Path) -> bytes:
        """Return a mask and what is made of it, to be digested."""
        settings = f"{self.invert} {self.least} {self.normalised}{' p' * self.proportion}"
        return read_bytes(file, str(file)) + settings.encode()

    def digest(self, file: Path) -> str:
        """Return the digest of a mask and of what is made of it."""
        return hashlib.sha256(self.content(file)).hexdigest()[:16]

    def read(self, file: Path, image: Path, pixels: Pixels) -> Tensor:
        """Return a mask as its image is read, ``[1, H, W]``.

        Args:
            file: of the mask.
            image: its image, of the same size.
            pixels: how images are scaled and cut.

        Raises:
            DminError: the sizes differ, it cannot be read, or nothing of it counts.
        """
        content = read_bytes(file, str(file))
        own, theirs = (
            tuple(Pixels().decode(each, str(name)).image.shape[-2:])
            for each, name in ((content, file), (read_bytes(image, str(image)), image))
        )
        if own != theirs:
            raise DminError(
                f"the mask {file} is {own[0]} × {own[1]}, its image {image} {theirs[0]} × "
                f"{theirs[1]}. Bring the mask to the image's size."
            )
        mask = pixels.decode(content, str(file)).image[:1].clamp(0, 1)
        mask = 1 - mask if self.invert else mask
        least = self.least
        mask = least + (1 - least) * mask if self.proportion else mask.clamp_min(least)
        if not float(mask.sum()):
            raise DminError(f"the mask {file} is black all over: nothing of its image counts.")
        return mask / mask.mean() if self.normalised else mask

    def _of(self, root: Path, image: str) -> Path | None:
        path = PurePosixPath(image)
        folder = root / path.parent if self.folder is None else Path(self.folder) / path.parent
        ends = SUFFIXES if self.suffix is None else (self.suffix,)
        for end in ends:
            for file in (folder / f"{path.stem}{end}", folder / f"{path.stem}{end.upper()}"):
                if file.is_file():
                    return file
        return None
