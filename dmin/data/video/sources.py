"""From the bytes of a clip to its frames and their times: videos, animations, packed frames."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dmin.data.formats import open_image, suffixes
from dmin.data.pixels import Unreadable
from dmin.data.survey import read_bytes

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")
ANIMATIONS = (".gif", ".webp", ".apng")
# Allowed demuxers. Others, such as playlists, open further files and URLs.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
_PACKED = b"dmin frames\n"
NO_DECODER = "video files need PyAV: pip install 'dmin[video]' (or av)"


class Frame(NamedTuple):
    """One frame, not yet converted."""

    seconds: float | None  # since the first frame; None if the clip has no times
    size: tuple[int, int]  # width and height
    image: Callable[[], Image.Image]


class Source(NamedTuple):
    """A clip's frames in order, each decoded on access."""

    frames: Iterator[Frame]
    tick: float  # resolution of times, in seconds


def has_decoder() -> bool:
    """Return whether video files can be decoded (PyAV is installed)."""
    return importlib.util.find_spec("av") is not None


def is_still(name: str) -> bool:
    """Return whether a file can be a frame of a folder of frames, by its suffix."""
    return name.lower().endswith(tuple(s for s in suffixes() if s not in ANIMATIONS))


def read_clip(path: Path, name: str) -> bytes:
    """Return the bytes of a clip: of its file, or of all frames of a folder, by number.

    Raises:
        Unreadable: a file cannot be read.
    """
    if not path.is_dir():
        return read_bytes(path, name)
    files = sorted((f for f in path.iterdir() if is_still(f.name)), key=lambda f: numbered(f.name))
    parts = [read_bytes(file, f"{name}/{file.name}") for file in files]
    head = json.dumps([[f.name, len(part)] for f, part in zip(files, parts, strict=True)])
    return b"".join([_PACKED, head.encode(), b"\n", *parts])


def numbered(name: str) -> list[tuple[int, str]]:
    """Return a key of natural sorting: ``frame_9.png`` before ``frame_10.png``."""
    parts: list[str] = [""]
    for letter in name:
        if letter.isdecimal() != parts[-1][-1:].isdecimal() and parts[-1]:
            parts.append("")
        parts[-1] += letter
    return [(int(p), p) if p.isdecimal() else (-1, p) for p in parts]


def source(content: bytes, name: str, opened: Callable[[bytes, str], Any]) -> Source:
    """Return the frames of a clip.

    Args:
        content: the result of :func:`read_clip`.
        name: name of the clip in messages.
        opened: returns a context that opens bytes as an image, without decoding it.

    Raises:
        Unreadable: it is not a video, or a frame is damaged (raised on access).
    """
    if content.startswith(_PACKED):
        return Source(_packed(content, name, opened), 0.0)
    try:
        open_image(content).close()
    except Exception:  # not an image: a video, or an unknown format
        return _video(content, name)
    return Source(_animation(content, name, opened), 0.01)


def _packed(content: bytes, name: str, opened: Callable[[bytes, str], Any]) -> Iterator[Frame]:
    head, _, rest = content.removeprefix(_PACKED).partition(b"\n")
    start, size = 0, None
    for file, length in json.loads(head):
        with opened(rest[start : start + length], f"{name}/{file}") as image:
            if image.size != (size := size or image.size):
                raise Unreadable(name, f"its frames have several sizes ({size}, {image.size})")
            image.load()
            yield Frame(None, image.size, image.copy)
        start += length


def _animation(content: bytes, name: str, opened: Callable[[bytes, str], Any]) -> Iterator[Frame]:
    with opened(content, name) as image:
        elapsed: float | None = 0.0
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            lasts = image.info.get("duration", 0) / 1000
            elapsed = None if number == 0 and not lasts else elapsed
            yield Frame(elapsed, image.size, image.copy().copy)
            elapsed = None if elapsed is None else elapsed + lasts


def _video(content: bytes, name: str) -> Source:
    if not has_decoder():
        raise Unreadable(name, NO_DECODER)
    av: Any = importlib.import_module("av")
    try:
        container = av.open(io.BytesIO(content), options={"format_whitelist": _FORMATS})
    except (av.error.FFmpegError, ValueError) as error:
        what = "empty" if not content else f"not a supported video, or damaged ({_reason(error)})"
        raise Unreadable(name, f"it is {what}") from error
    if not container.streams.video:
        container.close()
        raise Unreadable(name, "it has no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # several files are decoded in parallel
    stream.codec_context.options = {"err_detect": "explode"}  # by default errors are concealed
    return Source(_decoded(container, stream, name, av), float(stream.time_base or 0))


def _decoded(container: Any, stream: Any, name: str, av: Any) -> Iterator[Frame]:
    first, count, end = None, 0, 0.0
    with container:
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt or frame.time is None:
                    raise Unreadable(name, f"it is damaged at frame {count}")
                first = frame.time if first is None else first
                size = frame.width, frame.height
                yield Frame(frame.time - first, size, partial(_upright, frame))
                count, end = count + 1, frame.time + float((frame.duration or 0) * frame.time_base)
        except av.error.FFmpegError as error:
            raise Unreadable(name, f"it is damaged at frame {count} ({_reason(error)})") from error
        if count < stream.frames:
            raise Unreadable(name, f"its header says {stream.frames} frames, but it has {count}")
        whole = (container.duration or 0) / av.time_base  # of all streams
        if len(container.streams) == 1 and whole - end > 3 / float(stream.average_rate or 1):
            raise Unreadable(name, f"its header says {whole:.2f} s, but it ends after {end:.2f} s")


def _upright(frame: Any) -> Image.Image:
    """Return a frame with its rotation applied, which telephones store separately."""
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if getattr(frame, "rotation", 0) else image


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
