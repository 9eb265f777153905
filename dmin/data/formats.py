"""The image formats that are opened, and how they are recognised."""

import functools
import importlib.util
import io
import os
import warnings

from PIL import Image, PngImagePlugin

# Formats that Pillow decodes itself, without another program (PostScript needs Ghostscript). They
# are recognised by content, not by name.
FORMATS = (
    *("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI"),
    *("SGI", "TGA", "TIFF", "WEBP"),
)
# Formats that Pillow reads with a plugin: the format, the plugin's module and package, suffixes.
PLUGINS = (
    ("HEIF", "pillow_heif", "pillow-heif", (".heic", ".heif", ".hif")),
    ("JXL", "pillow_jxl", "pillow-jxl-plugin", (".jxl",)),
    ("AVIF", "pillow_avif", "pillow-avif-plugin", (".avif", ".avifs")),
)
_NOT_OPENED = (
    *(".psd", ".xcf", ".kra", ".svg", ".ai", ".eps", ".pdf", ".exr", ".hdr", ".dds", ".icns"),
    *(".mp4", ".webm", ".mov", ".avi", ".mkv", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf"),
    *(".rw2", ".raf", ".pef", ".srw", ".raw", ".jxr"),
)
# Files of trainers, which may be many: never opened to look for an image.
_NO_IMAGES = (".txt", ".caption", ".json", ".jsonl", ".csv", ".parquet", ".npz", ".safetensors")
# Formats recognised by their first bytes alone; not TIFF, as raw files of cameras begin like it.
_TOLD = ("AVIF", "GIF", "JPEG", "JPEG2000", "PNG", "QOI", "WEBP")


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the formats that this build of Pillow and the installed plugins can open."""
    Image.init()
    for name, module, *_ in PLUGINS:
        if name not in Image.OPEN and importlib.util.find_spec(module) is not None:
            plugin = importlib.import_module(module)
            getattr(plugin, "register_heif_opener", lambda: None)()
    return tuple(name for name in (*FORMATS, "HEIF", "JXL") if name in Image.OPEN)


@functools.cache
def suffixes() -> tuple[str, ...]:
    """Return the suffixes of image files that can be opened, in lower case."""
    known = formats()
    return tuple(sorted(s for s, name in Image.registered_extensions().items() if name in known))


def open_image(content: bytes) -> Image.Image:
    """Return the image in a file's content, not yet decoded. All images are opened here.

    Raises:
        PIL.UnidentifiedImageError: the content is in none of the :func:`formats`.
    """
    # A generation workflow in a PNG may exceed Pillow's limit for a single text.
    limit = max(PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)
    PngImagePlugin.MAX_TEXT_CHUNK = limit
    with warnings.catch_warnings():  # callers compare the size with max_pixels
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(content), formats=formats())


def is_image(path: str) -> bool:
    """Return whether a file is an image, by its suffix or, if that is unknown, its first bytes."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in suffixes() or suffix in _NO_IMAGES or why_not_opened(path):
        return suffix in suffixes()
    try:
        with open(path, "rb") as file:
            beginning = file.read(64).ljust(64, b"\0")
    except OSError:
        return False
    accepts = (Image.OPEN[name][1] for name in _TOLD if name in formats())
    return any(accept is not None and accept(beginning) is True for accept in accepts)


def why_not_opened(name: str) -> str | None:
    """Return why images with this file's suffix cannot be opened; None for all other suffixes."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in suffixes():
        return None
    package = next((package for *_, package, some in PLUGINS if suffix in some), None)
    if package is not None:
        return f"{suffix} need the plugin {package} (pip install {package})"
    return f"{suffix} of a format that is not supported" if suffix in _NOT_OPENED else None


def what_it_is(content: bytes) -> str:
    """Return what a file that cannot be opened is, according to its first bytes."""
    beginning = content[:64].ljust(64, b"\0")
    for name, (factory, accept) in Image.OPEN.items():
        if name not in formats() and accept is not None and accept(beginning):
            what = getattr(factory, "format_description", None) or name
            return f"it is {what} ({name}), which is not supported: save it as PNG or JPEG"
    return f"its content is in none of the supported image formats ({', '.join(formats())})"
