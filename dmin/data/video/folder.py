"""A folder of clips, with captions and labels beside them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal  # noqa: F401 (Literal: see the annotations of Pixels)

import numpy as np
import torch

from dmin.data.base import Sizes
from dmin.data.image_folder import ImageFolder
from dmin.data.layout import Folder
from dmin.data.pictures import Pictures
from dmin.data.pixels import Picture, Unreadable
from dmin.data.video.sources import (
    ANIMATIONS,
    NO_DECODER,
    VIDEOS,
    Frame,
    has_decoder,
    is_still,
    read_clip,
    source,
)
from dmin.runtime.errors import DminError

MOST = 4  # a clip has at most MOST · max_pixels pixels over all frames, after scaling


@dataclass(eq=False, kw_only=True)
class VideoFolder(ImageFolder):
    """The clips of a folder, ordered by name; a clip's id is its path below the folder.

    A clip is a video (``.mp4``, ``.webm``, ``.mov``, ``.mkv``, ``.avi``, ``.m4v``; by PyAV), an
    animation (``.gif``, ``.webp``, ``.apng``), or a folder with its frames as images, in the order
    of the numbers in their names. Captions and labels are found as for images; the caption of the
    folder of frames ``a/jump`` is in ``a/jump.txt``. Images in a folder with clips are not
    examples. Frames are scaled and cropped like images.

    With ``fps``, the frame that is shown at each sampling time is taken. Folders of frames, and
    animations without delays, have no times: all their frames are taken, for any ``fps``.

    Args:
        fps: frames per second; None for the file's rate, which must be constant.
        frames: number of frames; None for all. Video models take 4n + 1 frames.
        start: seconds to skip at the beginning.
    """

    fps: float | None = None
    frames: int | None = None
    start: float = 0.0
    noun: ClassVar[str] = "clips"
    opened_suffixes: ClassVar[tuple[str, ...]] = (*VIDEOS, *ANIMATIONS)

    def __post_init__(self) -> None:
        """Check the settings, and find the clips.

        Raises:
            DminError: a setting is invalid, or a file in the folder is.
        """
        if self.fps is not None and not 0 < self.fps < 1000:
            raise DminError(f"data.fps={self.fps}: give frames per second, such as 16, or null.")
        if self.frames is not None and self.frames < 2:
            raise DminError(
                f"data.frames={self.frames}: a clip has two frames or more, such as 81; for "
                f"images use data=image_folder."
            )
        if not 0 <= self.start < 1e6:
            raise DminError(f"data.start={self.start}: give seconds from the beginning, 0 or more.")
        if self.condition_image is not None:
            raise DminError(
                "data.condition_image: no video model takes condition images. Set it to null."
            )
        super().__post_init__()

    def settings(self) -> dict[str, Any]:
        """Return the settings that affect the tensors, as JSON."""
        own = {"fps": self.fps, "frames": self.frames, "start": self.start}
        return {**super().settings(), **own}

    def content(self, path: Path, name: str) -> bytes:
        """Return the bytes of a clip, or of all frames in a folder of frames."""
        return read_clip(path, name)

    def is_example(self, path: Path) -> bool:
        """Return whether a path may be a clip: a file, or a folder that directly has frames."""
        return path.is_file() or (path.is_dir() and any(is_still(f.name) for f in path.iterdir()))

    def decode(self, content: bytes, name: str) -> Picture:
        """Return the clip in a file's content, ``[C, F, H, W]``; otherwise as for an image."""
        arrays, sizes = [], None
        for frame in self._chosen(content, name):
            image = frame.image()
            fitted, crop = self._fitted(self._coloured(image))
            sizes = sizes or Sizes((image.height, image.width), crop)
            arrays.append(np.asarray(fitted))
        assert sizes is not None
        clip = np.stack(arrays)
        clip = clip[None] if clip.ndim == 3 else clip.transpose(3, 0, 1, 2)
        return Picture(torch.from_numpy(np.divide(clip, 255, dtype=np.float32)), sizes)

    def probe(self, content: bytes, name: str) -> None:
        """Refuse what :meth:`decode` refuses, but faster."""
        for _ in self._chosen(content, name):
            pass

    def _chosen(self, content: bytes, name: str) -> Iterator[Frame]:
        """Yield the frames that are taken.

        Raises:
            Unreadable: there are too few, or they do not fit the settings.
        """
        found = source(content, name, self._opened)
        count, pixels, times = 0, 0, []
        for frame in self._sampled(found.frames, name):
            if reason := self._misfit(*frame.size):
                raise Unreadable(name, reason)
            pixels += math.prod(self._size_of(frame.size))
            if pixels > MOST * self.max_pixels:
                many = f"more than {MOST} × max_pixels={self.max_pixels} pixels in all"
                raise Unreadable(name, f"it has {many}: set data.frames, or a smaller data.size")
            times.append(frame.seconds)
            yield frame
            count += 1
            if count == self.frames:
                break
        if self.fps is None and None not in times:
            gaps = np.diff(np.array(times, dtype=float)) if count > 1 else np.zeros(1)
            if gaps.max() - gaps.min() > 1.01 * found.tick + 1e-6:
                low, high = 1000 * gaps.min(), 1000 * gaps.max()
                uneven = f"its frames are {low:.0f} to {high:.0f} ms apart"
                raise Unreadable(name, f"{uneven}, not at a constant rate: set data.fps")
        if count < (self.frames or 2):
            at = "" if self.fps is None else f" at data.fps={self.fps:g}"
            after = f" from data.start={self.start:g} s on" if self.start else ""
            need = f"data.frames={self.frames}" if self.frames else "a clip of 2"
            raise Unreadable(name, f"it has {count} frame(s){at}{after}, too few for {need}")

    def _sampled(self, frames: Iterator[Frame], name: str) -> Iterator[Frame]:
        """Yield the frame shown at each sampling time, or every frame at the file's own rate."""
        shown: Frame | None = None
        gap, since, taken = 0.0, 0.0, 0
        for number, frame in enumerate(frames):
            at = frame.seconds
            if at is None and self.fps is not None:
                at = number / self.fps
            if at is None and self.start:
                raise Unreadable(name, "its frames have no timestamps: data.start needs data.fps")
            if at is None or self.fps is None:
                if at is None or at >= self.start - 1e-6:
                    yield frame
                continue
            while shown is not None and self.start + taken / self.fps < at - 1e-6:
                yield shown
                taken += 1
            gap, since, shown = at - since, at, frame
        while shown is not None and self.start + taken / (self.fps or 1) < since + gap - 1e-6:
            yield shown
            taken += 1

    def _files_of(self, root: Path) -> Folder:
        files = ClipFiles(root)
        videos = [file for file in files.images if file.lower().endswith(VIDEOS)]
        if videos and not has_decoder():
            raise DminError(f"data.root={root}: {videos[0]} is a video, and {NO_DECODER}.")
        return files


@dataclass(eq=False, kw_only=True)
class Clips(Pictures, VideoFolder):
    """Query clips: one, several, or a folder of them."""

    def __post_init__(self) -> None:
        """Find the clips with their captions and labels.

        Raises:
            DminError: as the base classes; or a region or mask is given.
        """
        if self.region is not None or self.mask is not None:
            raise DminError(
                "queries.region and queries.mask (--region, --mask) ask about a part of a picture, "
                "which is not possible for clips. Leave them out."
            )
        super().__post_init__()


def saved(folder: Path) -> ImageFolder:
    """Return a folder that :func:`~dmin.data.image_folder.save_images` wrote, as a dataset."""
    kind = VideoFolder if any(folder.glob("*.webp")) else ImageFolder
    return kind(folder, mode=None)


@dataclass
class ClipFiles(Folder):
    """The files of a folder of clips, classified."""

    noun: str = "clips"

    def _candidates(self) -> list[str]:
        clips = [file for file in self.files if file.lower().endswith((*VIDEOS, *ANIMATIONS))]
        stills = [file for file in self.files if is_still(file)]
        beside = {os.path.dirname(clip) for clip in clips}
        folders: dict[str, list[str]] = {}
        for still in stills:
            folders.setdefault(os.path.dirname(still), []).append(still)
        for folder in beside & folders.keys():
            self._why |= dict.fromkeys(folders.pop(folder), "pictures beside clips")
        if "" in folders:
            raise DminError(
                f"data.root={self.root} contains images, like a folder of frames: give "
                f"its parent folder. For images that are not frames use data=image_folder."
            )
        self._folders: set[str] = set(folders)
        self.used.update(still for each in folders.values() for still in each)
        return sorted([*clips, *folders])

    def _stem(self, example: str) -> str:
        return example if example in self._folders else super()._stem(example)

    def _masks(self, images: Any) -> list[str]:
        return []
