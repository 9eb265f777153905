"""From an image array to a picture that can be shown, encoded and scaled."""

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from dmin.runtime.errors import DminError

Images = Callable[[str], np.ndarray]
"""From an id to its image: [C, H, W] with C of 1 or 3, values in [0, 1]; or a clip [C, F, H, W]."""

TINY = 64
"""Up to this side, in pixels, an image is enlarged without smoothing and stored losslessly."""


def to_picture(array: np.ndarray, name: str) -> Image.Image:
    """Turn an image array into a grey or RGB picture.

    Args:
        array: [C, H, W] with C of 1 or 3, values in [0, 1]; of a clip, the middle frame is used.
        name: name of the image in error messages.

    Raises:
        DminError: the shape is another, or values are outside [0, 1] by more than rounding.
    """
    if array.ndim == 4:
        array = array[:, array.shape[1] // 2]
    array = np.asarray(array, np.float32)
    if array.ndim != 3 or array.shape[0] not in (1, 3) or 0 in array.shape:
        raise DminError(
            f"Image {name!r} has shape {list(array.shape)}: a gallery shows [channels, height, "
            "width] with 1 or 3 channels. Move the channels first, or decode the latents."
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= -0.01 and high <= 1.01):
        raise DminError(
            f"Image {name!r} has values from {low:.3g} to {high:.3g}: a gallery shows [0, 1]. "
            "Convert images in [-1, 1] by (image + 1) / 2."
        )
    pixels = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


SMOOTHED = 1 / 8  # of the shorter side, because contributions of single positions are mostly noise
FOR, AGAINST = (37, 101, 168), (200, 85, 61)


def smoothed(places: np.ndarray) -> np.ndarray:
    """Smooth an attribution map ``[h, w]`` by a Gaussian of an eighth of its shorter side."""
    sigma = SMOOTHED * min(places.shape)
    return gaussian_filter(np.asarray(places, np.float64), sigma, mode="constant")


def overlaid(picture: Image.Image, places: np.ndarray) -> Image.Image:
    """Lay an attribution map over a pale, enlarged picture: blue raises the score, red lowers it.

    Args:
        picture: the picture.
        places: ``[h, w]``, the map of the whole picture; smoothed here, its largest in full colour.
    """
    picture = fit(picture, max(192, *picture.size))
    values = smoothed(places)
    values = values / max(float(np.abs(values).max()), 1e-30)
    scaled = Image.fromarray(values.astype(np.float32)).resize(picture.size)
    strength = np.asarray(scaled)[..., None]
    grey = 0.5 * 255 + 0.5 * np.asarray(picture.convert("L"), np.float32)[..., None]
    colour = np.where(strength > 0, np.array(FOR), np.array(AGAINST))
    share = 0.8 * np.abs(strength)
    return Image.fromarray(((1 - share) * grey + share * colour).clip(0, 255).astype(np.uint8))


def remembered(images: Images, memory: int = 1 << 29) -> Images:
    """Return the same images with a cache of decoded ones.

    Args:
        images: decodes an image.
        memory: most bytes of cached pixels; the least recently used are dropped first.
    """
    kept: dict[str, np.ndarray] = {}  # 8 bits per value, as displayed

    def image(id: str) -> np.ndarray:
        found = kept.pop(id, None)
        if found is None:
            decoded = np.asarray(images(id), np.float32)
            found = (decoded * 255).round().clip(0, 255).astype(np.uint8)
            if np.abs(found / np.float32(255) - decoded).max(initial=0) > 1e-6:
                return decoded  # not of 8 bits: not cached
        kept[id] = found
        while len(kept) > 1 and sum(each.nbytes for each in kept.values()) > memory:
            kept.pop(next(iter(kept)))
        return found / np.float32(255)

    return image


def fit(picture: Image.Image, side: int) -> Image.Image:
    """Scale a picture so that its longer side is `side` pixels; tiny ones without smoothing."""
    longest = max(picture.size)
    width, height = (max(1, round(length * side / longest)) for length in picture.size)
    enlarged_tiny = longest <= TINY and side >= longest
    method = Image.Resampling.NEAREST if enlarged_tiny else Image.Resampling.LANCZOS
    return picture.resize((width, height), method)


PREVIEW, SHOWN, A_SECOND = 96 << 10, 24, 16  # most bytes; most frames; a clip's frames per second


def preview(clip: np.ndarray, name: str) -> bytes:
    """Encode a clip as an animated WebP of bounded size that plays as long as at 16 frames/s.

    Args:
        clip: [C, F, H, W] in [0, 1].
        name: its name in error messages.
    """
    count, side = clip.shape[1], 192
    while True:
        chosen = np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int)
        frames = [to_picture(clip[:, place], name).convert("RGB") for place in chosen]
        tiny = max(frames[0].size) <= TINY
        first, *others = [f if max(f.size) <= side else fit(f, side) for f in frames]
        pace = round(1000 * count / A_SECOND / len(chosen))
        told = dict(save_all=True, append_images=others, duration=pace, loop=0, lossless=tiny)
        content = _encode(first, "WEBP", quality=60, **told)
        if len(content) <= PREVIEW or side < 24:
            return content
        side //= 2


def data_uri(picture: Image.Image, limit: int = 256) -> str:
    """Encode a picture as a `data:` address; arguments as in :func:`encoded`."""
    return address_of(*encoded(picture, limit))


def address_of(kind: str, content: bytes) -> str:
    """Return the `data:` address of an encoded picture."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def encoded(picture: Image.Image, limit: int = 256) -> tuple[str, bytes]:
    """Encode a picture for a page.

    Args:
        picture: scaled down to at most `limit` pixels a side.
        limit: 256 is enough for a card on a dense screen.

    Returns:
        `png` or `jpeg`, and the bytes: a lossless PNG for a tiny picture; for a larger one the
        smaller of a PNG and a JPEG of quality 90, because a page of a thousand photographs would
        otherwise have 100 MB.
    """
    tiny = max(picture.size) <= TINY
    if max(picture.size) > limit:
        picture = fit(picture, limit)
    content = _encode(picture, "PNG", optimize=True)
    if not tiny:
        smaller = _encode(picture, "JPEG", quality=90, subsampling=0)
        if len(smaller) < len(content):
            return "jpeg", smaller
    return "png", content


def _encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
