"""From an image file to a tensor: one stated way for every dataset of image files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from dmin.errors import DminError


class Unreadable(DminError):
    """An image that cannot be read.

    Args:
        name: what to call the image.
        reason: why not, as half a sentence.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read: {reason}. Mend it or leave it out.")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by what it was made of, to travel from a loader's worker process."""
        return type(self), (self.name, self.reason)


@dataclass(kw_only=True)
class Pixels:
    """How image files become tensors; the settings that all datasets of image files share.

    An image is turned as its EXIF orientation says; of an animation, the first frame is taken;
    16-bit grey is rounded to 8 bits; CMYK is converted without colour profiles.

    Args:
        size: height and width of every image; None takes images as they are.
        mode: ``RGB`` or ``L`` (grey) for all images; None keeps grey ones grey and turns all
            others into RGB.
        crop: with a size, ``center`` cuts the middle square out, so that the aspect ratio is kept;
            ``none`` keeps the whole image, squeezed into a square.
        resize: with a size, whether images may be scaled. Without scaling ``center`` cuts the
            middle out at full resolution, and ``none`` refuses images of another size.
        background: what stands behind transparent pixels: a colour's name or ``#rrggbb``.
        max_pixels: images with more are refused, as a small file can unpack to fill the memory.
    """

    size: int | None = None
    mode: Literal["RGB", "L"] | None = "RGB"
    crop: Literal["center", "none"] = "center"
    resize: bool = True
    background: str = "white"
    max_pixels: int = 89_478_485

    def __post_init__(self) -> None:
        """Refuse settings that no image could satisfy."""
        allowed: dict[str, tuple[Any, ...]] = {
            "mode": ("RGB", "L", None),
            "crop": ("center", "none"),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                listed = ", ".join("null" if c is None else c for c in choices)
                raise DminError(f"data.{name}={getattr(self, name)!r}: choose one of {listed}.")
        for name in ("size", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DminError(f"data.{name}={value}: a positive number of pixels is needed.")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise DminError(
                f"data.background={self.background!r} is no colour. Give a name such as white or "
                f"grey, or #rrggbb."
            ) from error

    def settings(self) -> dict[str, Any]:
        """Return what changes the tensors, as JSON."""
        names = ("size", "mode", "crop", "resize", "background")
        return {name: getattr(self, name) for name in names}

    def decode(self, content: bytes, name: str) -> Tensor:
        """Return the image in a file's content as float32 ``[C, H, W]`` in [0, 1].

        Args:
            content: the bytes of an image file.
            name: what to call it in a message.

        Raises:
            Unreadable: it is no image, is damaged, or does not fit the settings.
        """
        with self._opened(content, name) as opened:
            image = self._fitted(self._coloured(ImageOps.exif_transpose(opened)))
            pixels = np.asarray(image, dtype=np.float32) / 255
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(pixels))

    def probe(self, content: bytes, name: str) -> None:
        """Refuse what :meth:`decode` would refuse, in a part of its time.

        Args:
            content: the bytes of an image file.
            name: what to call it in a message.

        Raises:
            Unreadable: as for ``decode``.
        """
        with self._opened(content, name) as opened:
            opened.draft(None, (1, 1))  # a JPEG is read to its end, but unpacked small
            opened.load()
            if opened.mode.startswith(("I", "F")):
                _eight_bits(opened)

    @contextmanager
    def _opened(self, content: bytes, name: str) -> Iterator[Image.Image]:
        """Open an image that fits the settings; whatever goes wrong with it is told by name."""
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and self.max_pixels > limit:
            # Pillow's own limit is a global; it only ever rises, and only because a user said so.
            Image.MAX_IMAGE_PIXELS = self.max_pixels
        try:
            with Image.open(io.BytesIO(content)) as opened:
                reason = self._misfit(*opened.size)
                if reason is not None:
                    raise Unreadable(name, reason)
                yield opened
        except Unreadable as error:
            raise Unreadable(name, error.reason) from None
        except Exception as error:  # Pillow's decoders raise a dozen types for damaged files
            raise Unreadable(name, self._reason(content, error)) from error

    def _misfit(self, width: int, height: int) -> str | None:
        """Return why an image of this size is not taken, whichever way up it is."""
        if width * height > self.max_pixels:
            return f"{width} × {height} pixels are more than max_pixels={self.max_pixels}"
        if self.size is None or self.resize:
            return None
        if self.crop == "none" and not width == height == self.size:
            return (
                f"it is {width} × {height}, not {self.size} × {self.size}, and resize=false with "
                f"crop=none takes no other"
            )
        if min(width, height) < self.size:
            return f"it is {width} × {height}, smaller than size={self.size}, and resize=false"
        return None

    def _coloured(self, image: Image.Image) -> Image.Image:
        if image.mode.startswith(("I", "F")):
            image = _eight_bits(image)
        grey = image.mode in ("1", "L", "LA", "La")
        mode = self.mode or ("L" if grey else "RGB")
        if image.has_transparency_data:
            front = image.convert("RGBA")
            behind = Image.new("RGBA", front.size, self.background)
            image = Image.alpha_composite(behind, front)
        return image.convert(mode)

    def _fitted(self, image: Image.Image) -> Image.Image:
        if self.size is None or image.size == (self.size, self.size):
            return image
        square, (width, height) = (self.size, self.size), image.size
        if self.resize:
            fit = ImageOps.fit if self.crop == "center" else Image.Image.resize
            return fit(image, square, Image.Resampling.LANCZOS)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def _reason(self, content: bytes, error: Exception) -> str:
        if not content:
            return "it is empty"
        if isinstance(error, Image.DecompressionBombError):
            return f"it has far more pixels than max_pixels={self.max_pixels}"
        if isinstance(error, Image.UnidentifiedImageError):
            return "its content is in no image format that Pillow knows"
        return f"it is damaged ({error or type(error).__name__})"


def _eight_bits(image: Image.Image) -> Image.Image:
    """Round 16-bit grey to 8 bits, which Pillow would clip to white instead."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise Unreadable(
            "", f"its pixels (mode {image.mode}) have no stated range: save it with 8 or 16 bits"
        )
    return Image.fromarray((values / 257).round().astype(np.uint8))
