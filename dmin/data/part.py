"""The part of a query picture that is asked about: a region, or a mask."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dmin.data.formats import open_image
from dmin.data.masks import Masks
from dmin.data.pixels import Pixels
from dmin.data.survey import read_bytes
from dmin.runtime.errors import DminError

ASPECT = 0.02  # largest relative difference between aspect ratios of mask and picture
LEFT = 0.05  # smallest fraction of a part that a centre crop may keep; less can be ringing


@dataclass(frozen=True)
class Part:
    """The part of a query picture that is attributed, as a mask m of weights with mean 1.

    Args:
        region: ``[x, y, width, height]`` from the upper left corner, in pixels of the picture's
            file; if all are at most 1, as fractions of its width and height.
        mask: a mask for all pictures, white where they are attributed; or a folder with a mask of
            the same stem for each. Its size may differ, its aspect ratio must not. Grey has a
            smaller weight; transparent pixels have none.

    Raises:
        DminError: both are given, the region is invalid, or the mask does not exist.
    """

    region: Sequence[float] | None = None
    mask: str | Path | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.region is not None and self.mask is not None:
            raise DminError("queries.region and queries.mask are both set. Give one of them.")
        if self.mask is not None and not Path(self.mask).expanduser().exists():
            raise DminError(f"queries.mask={self.mask}: there is no such file or folder.")
        if self.region is None:
            return
        numbers = [n for n in self.region if isinstance(n, int | float) and math.isfinite(n)]
        if len(numbers) != 4 or len(self.region) != 4 or min(numbers[:2]) < 0:
            raise self._odd("give four numbers x, y, width and height, none of them negative")
        if min(numbers[2:]) <= 0:
            raise self._odd("width and height must be above zero")
        whole = all(float(n).is_integer() for n in numbers)
        if (max(numbers) <= 1) == whole:
            raise self._odd("give whole numbers of pixels, or shares up to 1, one of them below 1")

    @property
    def in_shares(self) -> bool:
        """Whether the region is in fractions of the picture's sides."""
        return max(self.region or (2,)) <= 1

    def spell(self) -> str:
        """Return a short description."""
        if self.region is None:
            return f"mask {Path(self.mask or '').name}"
        x, y, width, height = (f"{n:g}" for n in self.region)
        unit = "" if self.in_shares else " pixels"
        return f"{width} × {height}{unit} at ({x}, {y})"

    def of(self, root: Path, name: str, pixels: Pixels) -> Tensor:
        """Return the mask of a picture, scaled and cropped like it, ``[1, H, W]`` with mean 1.

        Args:
            root: the folder of the picture.
            name: its path below the folder.
            pixels: how pictures are scaled and cropped.

        Raises:
            DminError: the part is outside the picture, or cropping removes it.
        """
        path = root / name
        with open_image(read_bytes(path, str(path))) as opened:
            width, height = ImageOps.exif_transpose(opened).size
        if self.region is not None:
            drawn = self._drawn(width, height, str(path))
        else:
            drawn = self._read(root, name, width, height)
        kept = io.BytesIO()
        drawn.save(kept, "PNG")
        found = (
            Pixels(**{**pixels.settings(), "mode": "L"}).decode(kept.getvalue(), str(path)).image
        )
        found = found.clamp(0, 1)
        if float(found.mean()) < LEFT * np.asarray(drawn).mean() / 255:
            raise self._odd(
                f"almost none of it is left after {path} is cropped to its centre (data.crop=none "
                "keeps the whole picture)"
            )
        return found / found.mean()

    def _drawn(self, width: int, height: int, path: str) -> Image.Image:
        """Return the region in white on black, with the picture's size."""
        x, y, across, down = self.region or ()
        if self.in_shares:
            x, across, y, down = x * width, across * width, y * height, down * height
        left, top, right, bottom = (round(n) for n in (x, y, x + across, y + down))
        if right > width or bottom > height:
            raise self._odd(f"it is not inside {path}, which is {width} × {height} pixels")
        if left == right or top == bottom:
            raise self._odd(f"it covers less than a pixel of {path}, which is {width} × {height}")
        found = Image.new("L", (width, height))
        found.paste(255, (left, top, right, bottom))
        return found

    def _read(self, root: Path, name: str, width: int, height: int) -> Image.Image:
        """Return the mask from a file, with the picture's size."""
        file = Path(self.mask or "").expanduser()
        if file.is_dir():
            try:
                file = Masks(folder=file).find(root, [name])[name]
            except DminError as error:
                raise DminError(str(error).replace("data.masks", "queries.mask")) from error
        seen = Pixels(mode="L", background="black")  # transparent pixels have weight 0
        picture = seen.decode(read_bytes(file, str(file)), str(file)).image
        own = picture.shape[2] / picture.shape[1]
        if abs(own * height / width - 1) > ASPECT:
            raise DminError(
                f"the mask {file} is {picture.shape[2]} × {picture.shape[1]}, but its picture "
                f"{root / name} is {width} × {height}, a different aspect ratio. Crop it like the "
                "picture."
            )
        if not float(picture.sum()):
            raise DminError(f"the mask {file} is entirely black. Make the part to ask about white.")
        grey = Image.fromarray((picture[0] * 255).round().to(torch.uint8).numpy())
        return grey.resize((width, height), Image.Resampling.BILINEAR)

    def _odd(self, reason: str) -> DminError:
        said: Any = self.mask if self.region is None else list(self.region)
        return DminError(f"queries.{'mask' if self.region is None else 'region'}={said}: {reason}.")


def dimmed(image: Tensor, mask: Tensor | None) -> Tensor:
    """Return an image for display in which everything outside the mask is pale.

    Args:
        image: ``[C, H, W]`` in [0, 1].
        mask: ``[1, H, W]``, the attributed part; None for the whole image.
    """
    if mask is None:
        return image
    inside = mask / mask.max()
    return image * inside + (1 - inside) * (0.75 + 0.25 * image)
