"""From an image file to a tensor, in the same way for every dataset of image files."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, PngImagePlugin
from torch import Tensor

from dmin.data.base import Sizes
from dmin.data.formats import open_image, what_it_is
from dmin.runtime.errors import DminError

_ORIENTATION, _T = 0x0112, Image.Transpose
_UPS = (_T.FLIP_LEFT_RIGHT, _T.ROTATE_180, _T.FLIP_TOP_BOTTOM, _T.TRANSPOSE, _T.ROTATE_270)
_TURNS = dict(enumerate((*_UPS, _T.TRANSVERSE, _T.ROTATE_90), start=2))


class Picture(NamedTuple):
    """An image as a tensor, with its original size and crop."""

    image: Tensor  # float32 [C, H, W] in [0, 1]
    sizes: Sizes


class Unreadable(DminError):
    """An image that cannot be read.

    Args:
        name: name of the image.
        reason: the reason, as part of a sentence.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read: {reason}. Fix it or leave it out.")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle name and reason, so that it can be raised in a loader's worker process."""
        return type(self), (self.name, self.reason)


@dataclass(kw_only=True)
class Pixels:
    """How image files become tensors; settings that all datasets of image files share.

    The EXIF orientation is applied. Of an animation, the first frame is used. 16-bit grey is
    rounded to 8 bits. CMYK is converted without colour profiles.

    Args:
        size: height and width of every image; None keeps the size of each image.
        aspect: with a size, ``square`` gives every image that height and width; ``buckets`` gives
            each image the shape from :func:`buckets` with the nearest aspect ratio and about as
            many pixels as the square, as in the training of SDXL and similar models.
        bucket_step: sides of buckets are multiples of this.
        bucket_shapes: ``[height, width]`` of each bucket, instead of that list.
        bucket_ratio: quantity by which the nearest bucket is chosen: ``log`` of the aspect ratio,
            ``width/height`` (kohya's trainers) or ``height/width`` (OneTrainer).
        upscale: whether small images are scaled up. If not, only images with more than size²
            pixels are scaled (down), and sides are cropped to multiples of bucket_step.
        mode: ``RGB`` or ``L`` (grey) for all images; None keeps grey images grey and converts all
            others to RGB.
        crop: with a size, ``center`` keeps the aspect ratio and crops the centre; ``none`` scales
            the whole image to the square or bucket.
        resize: with a size, whether images may be scaled. Without scaling, ``center`` crops the
            centre at full resolution, and ``none`` refuses images of another size.
        background: colour behind transparent pixels, a name or ``#rrggbb``; None drops alpha.
        max_pixels: images with more pixels are refused, since a small file can fill the memory.
    """

    size: int | None = None
    aspect: Literal["square", "buckets"] = "square"
    bucket_step: int = 64
    bucket_shapes: Sequence[Sequence[int]] | None = None
    bucket_ratio: Literal["log", "width/height", "height/width"] = "log"
    upscale: bool = True
    mode: Literal["RGB", "L"] | None = "RGB"
    crop: Literal["center", "none"] = "center"
    resize: bool = True
    background: str | None = "white"
    max_pixels: int = 89_478_485

    at, mirrored = (0.5, 0.5), False  # of a draw, not settings: crop position (across, down), flip

    def __post_init__(self) -> None:
        """Check the settings."""
        allowed: dict[str, tuple[Any, ...]] = {
            "mode": ("RGB", "L", None),
            "crop": ("center", "none"),
            "aspect": ("square", "buckets"),
            "bucket_ratio": ("log", "width/height", "height/width"),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                listed = ", ".join("null" if c is None else c for c in choices)
                raise DminError(f"data.{name}={getattr(self, name)!r}: choose one of {listed}.")
        for name in ("size", "bucket_step", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DminError(f"data.{name}={value}: a positive number of pixels is needed.")
        if self.aspect == "buckets" and (self.size is None or not self.resize):
            raise DminError(
                f"data.aspect=buckets with data.size={self.size or 'null'}, data.resize="
                f"{str(self.resize).lower()}: images are scaled to buckets of about size² pixels, "
                f"so set a size, such as 1024, and keep resize=true."
            )
        if self.aspect != "buckets" and (self.bucket_shapes or not self.upscale):
            raise DminError("data.bucket_shapes and data.upscale=false need data.aspect=buckets.")
        if self.aspect == "buckets" and not self._buckets(self.size or 0):
            raise DminError(
                f"data.bucket_step={self.bucket_step} leaves no bucket for data.size={self.size}. "
                f"Set it to the value the model was trained with; 64 is usual for 512 pixels and "
                f"more."
            )
        try:
            ImageColor.getrgb(self.background or "white")
        except ValueError as error:
            raise DminError(
                f"data.background={self.background!r} is not a colour. Give a name such as white "
                f"or grey, or #rrggbb."
            ) from error

    def settings(self) -> dict[str, Any]:
        """Return the settings that affect the tensors, as JSON."""
        names = ["size", "mode", "crop", "resize", "background"]
        if self.aspect == "buckets":
            names += ["aspect", "bucket_step"]
            names += ["bucket_shapes"] * (self.bucket_shapes is not None)
            names += ["bucket_ratio"] * (self.bucket_ratio != "log")
            names += ["upscale"] * (not self.upscale)
        return {name: getattr(self, name) for name in names}

    def decode(self, content: bytes, name: str) -> Picture:
        """Return the image in a file's content.

        Args:
            content: the bytes of an image file.
            name: name of the image in messages.

        Raises:
            Unreadable: it is not an image, is damaged, or does not fit the settings.
        """
        with self._opened(content, name) as opened:
            upright = _upright(opened)
            image, crop = self._fitted(self._coloured(upright))
            image = ImageOps.mirror(image) if self.mirrored else image
            pixels = np.asarray(image, dtype=np.float32) / 255
            sizes = Sizes((upright.height, upright.width), crop)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return Picture(torch.from_numpy(np.ascontiguousarray(pixels)), sizes)

    def probe(self, content: bytes, name: str) -> tuple[int, int] | None:
        """Refuse what :meth:`decode` refuses, but faster; return height and width of an image."""
        with self._opened(content, name) as opened:
            size = opened.size
            opened.draft(None, (1, 1))  # a JPEG is read completely, but decoded at a small size
            opened.load()
            if opened.mode.startswith(("I", "F")):
                _eight_bits(opened)
            return size if opened.getexif().get(_ORIENTATION, 1) in range(5, 9) else size[::-1]

    @contextmanager
    def _opened(self, content: bytes, name: str) -> Iterator[Image.Image]:
        """Open an image that fits the settings; all errors become ``Unreadable`` with its name."""
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and self.max_pixels > limit:
            # Pillow's limit is global; it is only raised, and only if the user's setting is higher.
            Image.MAX_IMAGE_PIXELS = self.max_pixels
        try:
            with open_image(content) as opened:
                reason = self._misfit(*opened.size)
                if reason is not None:
                    raise Unreadable(name, reason)
                yield opened
        except Unreadable as error:
            raise Unreadable(name, error.reason) from None
        except Exception as error:  # Pillow's decoders raise a dozen types for damaged files
            raise Unreadable(name, self._reason(content, error)) from error

    def _misfit(self, width: int, height: int) -> str | None:
        """Return why an image of this size is refused, or None; orientation does not matter."""
        if width * height > self.max_pixels:
            return f"{width} × {height} pixels are more than max_pixels={self.max_pixels}"
        if self.size is None or self.resize:
            return None
        if self.crop == "none" and not width == height == self.size:
            return (
                f"it is {width} × {height}, not {self.size} × {self.size}, which resize=false with "
                "crop=none requires"
            )
        if min(width, height) < self.size:
            return f"it is {width} × {height}, smaller than size={self.size}, and resize=false"
        return None

    def _coloured(self, image: Image.Image) -> Image.Image:
        if image.mode.startswith(("I", "F")):
            image = _eight_bits(image)
        mode = self.mode or ("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if self.background is not None:
                behind = Image.new("RGBA", image.size, self.background)
                image = Image.alpha_composite(behind, image)
        return image.convert(mode)

    def _fitted(self, image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
        """Return the scaled and cropped image, and top and left of the crop."""
        across, down = self._size_of(image.size)
        width, height = image.size
        if (across, down) == image.size:
            return image, (0, 0)
        if self.resize and self.crop == "none":
            return image.resize((across, down), Image.Resampling.LANCZOS), (0, 0)
        scale = max(across / width, down / height) if self.resize else 1
        rest = round(width * scale) - across, round(height * scale) - down
        left, top = (
            n // 2 if a == 0.5 else int((n + 1) * a) for n, a in zip(rest, self.at, strict=True)
        )
        if self.resize and self.at == (0.5, 0.5):  # with subpixel accuracy
            return ImageOps.fit(image, (across, down), Image.Resampling.LANCZOS), (top, left)
        if self.resize:
            whole = across + rest[0], down + rest[1]
            image = image.resize(whole, Image.Resampling.LANCZOS)
        return image.crop((left, top, left + across, top + down)), (top, left)

    def _size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the width and height to which an image of this size is brought."""
        if self.size is None:
            return size
        if self.aspect == "square":
            return self.size, self.size
        width, height = size
        if not self.upscale and self.bucket_shapes is None:
            scale, step = min(1.0, self.size / math.sqrt(width * height)), self.bucket_step
            across, down = (max(step, int(x * scale + 1e-6) // step * step) for x in size)
            return across, down
        shapes = self._buckets(self.size)
        down, across = min(shapes, key=lambda b: self._away(b[0], b[1], width / height))
        return across, down

    def _away(self, down: int, across: int, ratio: float) -> tuple[float, int]:
        """Return the distance of a bucket from an image's width / height, and a tie-breaker."""
        if self.bucket_ratio == "log":  # of equal ones the larger: square images become the square
            return abs(math.log(down / across) + math.log(ratio)), -down * across
        if self.bucket_ratio == "height/width":
            return abs(down / across - 1 / ratio), across
        return abs(across / down - ratio), across

    def _buckets(self, side: int) -> Sequence[Sequence[int]]:
        return self.bucket_shapes or buckets(side, self.bucket_step)

    def _reason(self, content: bytes, error: Exception) -> str:
        if not content:
            return "it is empty"
        if isinstance(error, Image.DecompressionBombError):
            return f"it has far more pixels than max_pixels={self.max_pixels}"
        if isinstance(error, Image.UnidentifiedImageError):
            return what_it_is(content)
        if "MAX_TEXT" in str(error) or "Too much memory used in text" in str(error):
            return f"the text in it is longer than {PngImagePlugin.MAX_TEXT_MEMORY >> 20} MiB"
        return f"it is damaged ({error or type(error).__name__})"


def _upright(image: Image.Image) -> Image.Image:
    """Apply an image's EXIF orientation; other EXIF fields are not read, as they may be damaged."""
    image.load()
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


@functools.cache
def buckets(size: int, step: int) -> tuple[tuple[int, int], ...]:
    """Return shapes of about size² pixels, ``(height, width)``, from tall to wide.

    One side is a multiple of the step between size/2 and size; the other is the largest multiple
    for which the shape has at most size² pixels (Podell et al. 2023, appendix I, has such a list).
    """
    found = set()
    for short in range(-(-size // (2 * step)) * step, size + 1, step):
        long = size * size // short // step * step
        found |= {(long, short), (short, long)}
    return tuple(sorted(found, key=lambda b: b[1] / b[0]))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Round 16-bit grey to 8 bits; Pillow would clip it."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise Unreadable(
            "", f"its pixels (mode {image.mode}) have no stated range: save it with 8 or 16 bits"
        )
    return Image.fromarray((values / 257).round().astype(np.uint8))
