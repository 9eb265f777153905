"""Tar shards as WebDataset writes them, read at random by position with the standard library."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple  # noqa: F401 (Literal: see the annotations of Pixels)

from dmin.data.base import Example
from dmin.data.files import survey
from dmin.data.metadata import as_caption, as_label
from dmin.data.pixels import Pixels, Unreadable
from dmin.errors import DminError

IMAGES = ("png", "jpg", "jpeg", "webp")
_READ = (*IMAGES, "txt", "cls", "json")
_BLOCK = 512  # of a tar file


class Part(NamedTuple):
    """Where a file stands in a shard."""

    start: int
    size: int


@dataclass(eq=False)
class TarShards(Pixels):
    """The samples of tar files: ``{key}.jpg`` (png, webp), with ``{key}.txt``, ``.cls``, ``.json``.

    An id is the shard's name and the key. ``.txt`` is the caption and ``.cls`` the label; what
    ``.json`` holds travels with the example, and gives caption and label where those files are not
    there. Shards must not be compressed, as only then can one sample be read without the others.

    Args:
        shards: tar files: a path, or a pattern such as ``data/*.tar`` or
            ``data/{000..041}.tar``, or a list of them.
        text: field of ``.json`` that is the caption; None for none.
        label: field of ``.json`` that is the label; None for none.

    Attributes:
        ids: ids of the samples, by shard, then as they stand in it.

    Raises:
        DminError: no shards, two of one name, one that is cut off or compressed, or a sample
            without exactly one image.
    """

    shards: str | Sequence[str]
    _: KW_ONLY
    text: str | None = "text"
    label: str | None = "label"

    def __post_init__(self) -> None:
        """Note where every sample stands."""
        super().__post_init__()
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        self.paths = sorted({path for pattern in patterns for path in _expand(str(pattern))})
        by_name: dict[str, Path] = {}
        for path in self.paths:
            other = by_name.setdefault(path.stem, path)
            if other != path:
                raise DminError(
                    f"{other} and {path} have the same name, which ids are made of. Rename one."
                )
        self.ids: list[str] = []
        self._samples: list[tuple[Path, dict[str, Part]]] = []
        for path in self.paths:
            for key, parts in _index(path).items():
                self.ids.append(f"{path.stem}/{key}")
                self._samples.append((path, parts))

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        """Return one example."""
        name, (path, parts) = self.ids[index], self._samples[index]
        where = f"{name} ({path})"
        # Opened anew each time: loaders' processes must not share a position in an open file.
        with path.open("rb") as file:
            content = {}
            for kind, part in parts.items():
                file.seek(part.start)
                content[kind] = file.read(part.size)
        image, sizes = self.decode(next(content[kind] for kind in IMAGES if kind in content), where)
        fields = _fields(content.get("json", b"{}"), where)
        caption = as_caption(fields.pop(self.text, None), where) if self.text else None
        label = as_label(fields.pop(self.label, None), where) if self.label else None
        if "txt" in content:
            caption = _decoded(content["txt"], where)
        if "cls" in content:
            text = _decoded(content["cls"], where).strip()
            label = int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text
        return Example(name, image, label, caption, fields, sizes)

    def describe(self) -> dict[str, Any]:
        """Return settings, and a digest of the name and bytes of every shard."""
        content = hashlib.sha256()
        for folder in sorted({path.parent for path in self.paths}):
            names = [path.name for path in self.paths if path.parent == folder]
            digests, problems = survey(folder, names)
            for name, reason in problems.items():
                raise Unreadable(str(folder / name), reason)
            content.update(json.dumps([[name, digests[name]] for name in names]).encode())
        return {
            "name": type(self).__name__,
            "examples": len(self),
            **self.settings(),
            "text": self.text,
            "label": self.label,
            "content": content.hexdigest()[:16],
        }


def _expand(pattern: str) -> list[Path]:
    """Return the files a pattern stands for: braces name files that must be, stars find some."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces:
        head, tail = pattern[: braces.start()], pattern[braces.end() :]
        inside = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
        if inside:
            first, last = inside.groups()
            numbers = range(int(first), int(last) + 1)
            choices = [str(number).zfill(len(first)) for number in numbers]
        else:
            choices = braces[1].split(",")
        return [path for choice in choices for path in _expand(f"{head}{choice}{tail}")]
    is_pattern = glob.has_magic(pattern) and not Path(pattern).is_file()
    found = [Path(name) for name in sorted(glob.glob(pattern))] if is_pattern else [Path(pattern)]
    absent = [path for path in found if not path.is_file()]
    if absent or not found:
        raise DminError(
            f"data.shards: there is no {absent[0] if absent else pattern}. Give tar files, such as "
            f"data/*.tar or data/{{000..041}}.tar."
        )
    return found


def _index(path: Path) -> dict[str, dict[str, Part]]:
    """Return where each sample's parts stand in a shard, without reading them."""
    samples: dict[str, dict[str, Part]] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                if not member.isreg() or not stem or not kind:
                    continue
                key = f"{folder}/{stem}".removeprefix("./").removeprefix("/")
                parts = samples.setdefault(key, {})
                if kind.lower() in parts:
                    raise DminError(f"{path} holds {member.name} twice. Write the shard anew.")
                parts[kind.lower()] = Part(member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise DminError(
            f"{path} cannot be read as a tar file ({error}). Unpack it if it is compressed; fetch "
            f"it again if it is cut off."
        ) from error
    with path.open("rb") as file:
        file.seek(end)
        # tarfile takes a file cut off between two samples for a whole one.
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise DminError(f"{path} is cut off: a tar file ends in zeros. Fetch it again.")
    odd = [key for key, parts in samples.items() if sum(kind in parts for kind in IMAGES) != 1]
    if odd or not samples:
        raise DminError(
            f"{path}: {len(odd)} of {len(samples)} samples have not exactly one image "
            f"({', '.join(IMAGES)}){f', such as {odd[0]}' if odd else ''}. Write the shard anew."
        )
    return {key: {k: p for k, p in parts.items() if k in _READ} for key, parts in samples.items()}


def _fields(content: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise DminError(f"the json of {where} is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise DminError(f"the json of {where} is not a JSON object.")
    return fields


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode().strip()
    except UnicodeDecodeError as error:
        raise DminError(f"the text of {where} is not UTF-8 ({error}).") from error
