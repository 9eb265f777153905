"""Files that accompany images: masks of the loss, as trainers read them, and condition images."""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from dmin.data.base import Example, Facts
from dmin.data.formats import open_image
from dmin.data.pixels import Picture, Pixels
from dmin.data.survey import read_bytes
from dmin.runtime.errors import DminError
from dmin.runtime.files import naming

NO_PARTNER = "it has no condition image"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Masks:
    """Masks of the loss: where they are, and how they are read. White is weight 1, black 0.

    Args:
        folder: folder with a mask of the same stem for each image; None: next to the images.
        suffix: text after the stem of an image, such as ``-masklabel.png``; None: any suffix.
        required: every image must have a mask. Otherwise images without one have weight 1.
        invert: black is weight 1 and white 0.
        least: the smallest weight; darker pixels get this weight.
        proportion: instead, scale weights linearly from [0, 1] to [least, 1].
        alpha: masks are the alpha channels of the images; transparent is black.
        normalised: divide each mask by its mean, so that the loss is a weighted mean.
    """

    folder: str | Path | None = None
    suffix: str | None = None
    required: bool = False
    invert: bool = False
    least: float = 0.0
    proportion: bool = False
    normalised: bool = False
    alpha: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            DminError: no source is given, there is no such folder, or ``least`` is not in [0, 1].
        """
        if self.folder is None and self.suffix is None and not self.alpha:
            raise DminError(
                "data.masks: give a folder of masks, or the suffix of masks next to the images."
            )
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
            DminError: an image has no mask and ``required`` is set, or no image has one.
        """
        found = {image: file for image in images if (file := self._of(root, image)) is not None}
        without = [image for image in images if image not in found]
        if not found or (without and self.required):
            raise DminError(
                f"{len(without)} of the {len(images)} images of {root} have no mask in "
                f"{self.folder or root}: {', '.join(without[:3])}. Add masks (white counts, so an "
                f"all-white mask for a whole image), or set data.masks=null."
            )
        return found

    def content(self, file: Path) -> bytes:
        """Return a mask's bytes and the settings, to be digested."""
        settings = f"{self.invert} {self.least} {self.normalised}{' p' * self.proportion}"
        return read_bytes(file, str(file)) + f"{settings}{' a' * self.alpha}".encode()

    def digest(self, file: Path) -> str:
        """Return a digest of a mask and the settings."""
        return hashlib.sha256(self.content(file)).hexdigest()[:16]

    def read(self, file: Path, image: Path, pixels: Pixels) -> Tensor:
        """Return a mask, scaled and cropped like its image, ``[1, H, W]``.

        Args:
            file: the file of the mask.
            image: the file of its image, of the same size.
            pixels: how images are scaled and cropped.

        Raises:
            DminError: the sizes differ, the mask cannot be read, or all weights are zero.
        """
        content = read_bytes(file, str(file))
        content = _alpha(content) if self.alpha else content
        own, theirs = (
            tuple(Pixels().decode(each, str(name)).image.shape[-2:])
            for each, name in ((content, file), (read_bytes(image, str(image)), image))
        )
        if own != theirs:
            raise DminError(
                f"the mask {file} is {own[0]} × {own[1]}, its image {image} {theirs[0]} × "
                f"{theirs[1]}. Scale the mask to the image's size."
            )
        mask = pixels.decode(content, str(file)).image[:1].clamp(0, 1)
        mask = 1 - mask if self.invert else mask
        least = self.least
        mask = least + (1 - least) * mask if self.proportion else mask.clamp_min(least)
        if not float(mask.sum()):
            raise DminError(f"the mask {file} is entirely black: no part of its image counts.")
        return mask / mask.mean() if self.normalised else mask

    def _of(self, root: Path, image: str) -> Path | None:
        if self.alpha:
            return root / image
        path = PurePosixPath(image)
        folder = root / path.parent if self.folder is None else Path(self.folder) / path.parent
        ends = SUFFIXES if self.suffix is None else (self.suffix,)
        return same_stem(folder, path.stem, ends)


def same_stem(folder: Path, stem: str, ends: Iterable[str]) -> Path | None:
    """Return the file with a stem and the first matching ending, in lower or upper case."""
    names = (f"{stem}{each}" for end in ends for each in (end, end.upper()))
    with naming("look for images in", folder):
        return next((file for name in names if (file := folder / name).is_file()), None)


def partners(
    root: Path, asked: str | Path, facts: Mapping[str, Facts], ends: Iterable[str]
) -> dict[str, str]:
    """Return the path below the root of each image's condition image, where there is one.

    Args:
        root: the folder of the images.
        asked: a folder, below the root or elsewhere, with files of the same relative paths and
            stems; the ending of files next to the images, such as ``-masklabel.png``; one image
            for all; or a metadata column with paths relative to the metadata file.
        facts: what is known about each image.
        ends: suffixes of images.

    Raises:
        DminError: ``asked`` is none of these.
    """
    place = next((p for p in (root / asked, Path(asked).expanduser()) if p.exists()), None)
    if str(asked).startswith("-"):
        place, ends = root, (str(asked),)
    if place is not None and place.is_file():
        return dict.fromkeys(facts, _below(root, place))
    found: dict[str, str] = {}
    for image, known in facts.items():
        path = PurePosixPath(image)
        said = (known.metadata or {}).get(str(asked)) if place is None else None
        if isinstance(said, str) and said:
            found[image] = (path.parent / said).as_posix()
        elif place is not None:
            file = same_stem(place / path.parent, path.stem, ends)
            found |= {} if file is None else {image: _below(root, file)}
    if not found:
        raise DminError(
            f"data.condition_image={asked}: this is neither a folder (in {root} or elsewhere) with "
            "files named like the images, nor a column of the metadata with file names. Give the "
            "folder or column that has the images to edit, masks or drawings."
        )
    return found


def _below(root: Path, file: Path) -> str:
    """Return a file's path relative to the root if it is below it, else its absolute path."""
    return (file.relative_to(root) if file.is_relative_to(root) else file.absolute()).as_posix()


def unlike(*sizes: Any) -> str | None:
    """Return why an image and its condition image, of these heights and widths, are no pair."""
    if len(sizes) < 2 or None in sizes:
        return None
    (height, width), (down, across) = sizes
    if abs(height * across - width * down) <= max(height, width, down, across):
        return None
    return (
        f"its condition image is {across} × {down} pixels, but the image is {width} × {height}, "
        "another aspect ratio: crop it like the image"
    )


def with_partner(example: Example, partner: Picture | None = None) -> Example:
    """Return an example with its condition image, if it has one.

    Args:
        example: the example, with its sizes.
        partner: the condition image, read with the same settings as the image. Sides may differ
            by a pixel after scaling.

    Raises:
        DminError: the aspect ratios differ, so that the two were cropped differently.
    """
    if partner is None or example.sizes is None:
        return example
    if reason := unlike(example.sizes.original, partner.sizes.original):
        raise DminError(f"{example.id!r}: {reason}.")
    return replace(example, condition_image=partner.image)


def _alpha(content: bytes) -> bytes:
    """Return the alpha channel of an image as a grey PNG, with the image's EXIF orientation."""
    found = io.BytesIO()
    with open_image(content) as opened:
        opened.convert("RGBA").getchannel("A").save(found, "PNG", exif=opened.getexif())
    return found.getvalue()
