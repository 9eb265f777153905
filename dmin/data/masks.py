"""Files that accompany images: masks of the loss, as trainers read them, and condition images."""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from torch import Tensor

from dmin.data.base import Example, Facts
from dmin.data.formats import open_image
from dmin.data.pixels import Picture, Pixels
from dmin.data.survey import read_bytes
from dmin.runtime.errors import DminError

NO_PARTNER = "it has no condition image"
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
        alpha: masks are the images' own alpha: what is transparent counts as black.
        normalised: divide each mask by its mean, so that the loss is the mean over what counts.
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
        """Refuse what says nothing.

        Raises:
            DminError: neither a folder nor a suffix is named, or the folder is not there.
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
            DminError: one has none, and must have one; or all of them have none.
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
        """Return a mask and what is made of it, to be digested."""
        settings = f"{self.invert} {self.least} {self.normalised}{' p' * self.proportion}"
        return read_bytes(file, str(file)) + f"{settings}{' a' * self.alpha}".encode()

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
    """Return the file of a stem in a folder; of several ends the first, in either case."""
    names = (f"{stem}{each}" for end in ends for each in (end, end.upper()))
    return next((file for name in names if (file := folder / name).is_file()), None)


def partners(
    root: Path, asked: str | Path, facts: Mapping[str, Facts], ends: Iterable[str]
) -> dict[str, str]:
    """Return the condition image of each image that has one, by its path below the root.

    Args:
        root: the folder of the images.
        asked: a folder, below the root or anywhere, that has a file of the same stem at the same
            place; ``-masklabel.png`` and the like, which ends the names of those beside; a picture
            for all; or the column of the metadata that names a file, relative to the metadata's.
        facts: what is known of each image.
        ends: of files that are images.

    Raises:
        DminError: it is none of these.
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
            f"data.condition_image={asked}: there is no such folder or picture, in {root} or "
            f"elsewhere, with files of the images' names, and no column of the metadata that names "
            f"files. Give the folder or column with the images to edit, masks or drawings."
        )
    return found


def _below(root: Path, file: Path) -> str:
    """Return a file's path from the root where it is below that, else its own."""
    return (file.relative_to(root) if file.is_relative_to(root) else file.absolute()).as_posix()


def with_partner(example: Example, partner: Picture | None = None) -> Example:
    """Return an example with its condition image, if it has one.

    Args:
        example: with its sizes.
        partner: read as its image was; sides may be a pixel off after scaling.

    Raises:
        DminError: it is of another shape, so that the two were cut otherwise.
    """
    if partner is None or example.sizes is None:
        return example
    (height, width), (down, across) = example.sizes.original, partner.sizes.original
    if abs(height * across - width * down) > max(height, width, down, across):
        raise DminError(
            f"the condition image of {example.id!r} is {across} × {down} pixels, the image {width} "
            f"× {height}, which is another shape. Crop it like the image."
        )
    return replace(example, condition_image=partner.image)


def _alpha(content: bytes) -> bytes:
    """Return the alpha of an image as a picture of grey, turned as the image is."""
    found = io.BytesIO()
    with open_image(content) as opened:
        opened.convert("RGBA").getchannel("A").save(found, "PNG", exif=opened.getexif())
    return found.getvalue()
