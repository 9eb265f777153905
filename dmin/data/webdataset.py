"""Tar shards as WebDataset writes them, read by random access with the standard library."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple  # noqa: F401 (Literal: see the annotations of Pixels)

from dmin.data.base import SCHEMA, Example, Facts
from dmin.data.checked import NO_TEXT, Checked, not_read, printable, require_same
from dmin.data.masks import NO_PARTNER, unlike, with_partner
from dmin.data.metadata import split_row
from dmin.data.pixels import Unreadable
from dmin.data.survey import expand, survey
from dmin.data.texts import decode_text, parse_json
from dmin.runtime.errors import DminError
from dmin.runtime.files import naming

IMAGES = ("png", "jpg", "jpeg", "webp")
_TEXTS = {"txt": "text", "cls": "text", "json": "json"}
_READ = (*IMAGES, *_TEXTS)
GIVEN = "given."  # prefix of the kinds of condition images
_BLOCK = 512  # bytes of a block of a tar file


class Part(NamedTuple):
    """Position and size of a file in a shard."""

    start: int
    size: int


@dataclass(eq=False)
class TarShards(Checked):
    """The samples of tar files: ``{key}.jpg`` (png, webp), with ``{key}.txt``, ``.cls``, ``.json``.

    An id consists of the shard's name and the key. ``.txt`` is the caption and ``.cls`` the label.
    The fields of ``.json`` become metadata, and give caption and label if there are no such files.
    Shards must not be compressed, so that single samples can be read.

    Args:
        shards: tar files: a path, or a pattern such as ``data/*.tar`` or
            ``data/{000..041}.tar``, or a list of them.
        text: field of ``.json`` with the caption; None for none.
        label: field of ``.json`` with the label; None for none.
        condition_image: NAME in ``{key}.NAME.png`` (or another suffix); None for none.

    Attributes:
        ids: ids of the samples, by shard, then in its order.
        summary: the files that are not read, on one line.

    Raises:
        DminError: there are no shards, two with the same name, or a truncated or compressed one;
            or a sample is unreadable or does not have exactly one image, unless it is skipped.
    """

    shards: str | Sequence[str]
    _: KW_ONLY
    text: str | None = "text"
    label: str | None = "label"
    condition_image: str | None = None

    def __post_init__(self) -> None:
        """Index the samples of all shards."""
        super().__post_init__()
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        self.paths: list[Path] = sorted(
            {path for pattern in patterns for path in expand(str(pattern))}
        )
        by_name: dict[str, Path] = {}
        for path in self.paths:
            other = by_name.setdefault(path.stem, path)
            if other != path:
                raise DminError(
                    f"{other} and {path} have the same name, from which ids are derived. Rename "
                    f"one."
                )
        given = {f"{self.condition_image}.{kind}".lower(): f"{GIVEN}{kind}" for kind in IMAGES}
        named = {kind: kind for kind in _READ} | given
        unread: Counter[str] = Counter()
        self._parts = {
            path: {f"{path.stem}/{key}": parts for key, parts in _index(path, named, unread)}
            for path in self.paths
        }
        self.summary: str = not_read(f"{count:,} {kind}" for kind, count in unread.most_common())
        samples = {
            id: (path, parts) for path, some in self._parts.items() for id, parts in some.items()
        }
        problems = self._problems(samples)
        self.leave_out(problems, len(samples), f"data.shards={self.shards}")
        self.ids: list[str] = [id for id in samples if id not in problems]
        self._samples = [samples[id] for id in self.ids]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        """Return one example."""
        name, (path, parts) = self.ids[index], self._samples[index]
        where = f"{name} ({path})"
        content = _read_sample(path, parts)
        facts = self._facts(content, where)
        row = _row(name, content, [facts.label, facts.caption])
        require_same(name, json.dumps(row).encode(), self.sums.get(name, ""))
        (image, sizes), *given = (self.decode(each, where) for each in _images(content))
        found = Example(name, image, facts.label, facts.caption, facts.metadata or {}, sizes)
        return with_partner(found, *given)

    def facts(self, index: int) -> Facts:
        """Return what is known about a sample besides its image, which is not read."""
        path, parts = self._samples[index]
        said = {kind: part for kind, part in parts.items() if kind in _TEXTS}
        return self._facts(_read_sample(path, said), f"{self.ids[index]} ({path})")

    def _facts(self, content: dict[str, bytes], where: str) -> Facts:
        """Return label, caption and metadata of a sample."""
        there = [kind for kind in _TEXTS if kind in content]
        said = {k: decode_text(content[k], f"the {_TEXTS[k]} of {where}") for k in there}
        fields = parse_json(said.get("json", "{}"), f"the json of {where}")
        label, caption, rest, _ = split_row(fields, self.label, self.text, where)
        if "cls" in said:
            text = said["cls"].strip()
            label = int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text
        return Facts(label, said["txt"].strip() if "txt" in said else caption, rest)

    def describe(self) -> dict[str, Any]:
        """Return settings, and a digest of the id, images, label and caption of every sample."""
        return self.described(len(self), content=self._content(1))

    def describe_fully(self, kept: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Return settings, and a digest of the name and bytes of every shard; ignore ``kept``."""
        columns = {"text": self.text, "label": self.label}
        found = self.described(len(self), **columns, content=self._content(0))
        del found["schema"]
        return found

    def _content(self, which: int) -> str:
        """Return a digest of the shards: 0 of their bytes, 1 of what gradients depend on."""
        content = hashlib.sha256()
        for found in self._survey().values():
            rows = [[name, found[name][which]] for name in sorted(found)]
            content.update(json.dumps(rows).encode())
        return content.hexdigest()[:16]

    def _problems(self, samples: Mapping[str, tuple[Path, dict[str, Part]]]) -> dict[str, str]:
        """Return the samples that cannot be used, with reasons; read them only with ``check``."""
        problems = {id: why for id, (_, p) in samples.items() if (why := self._lacks(id, p))}
        if self.check:
            captions: dict[str, str | None] = {}
            labels: set[str | None] = set()
            for found in self._survey().values():
                for _, _, unreadable, sums in found.values():
                    problems.update(unreadable)
                    captions |= {id: said[1] for id, (_, said) in sums.items()}
                    labels |= {said[0] for _, said in sums.values()}
            for name, column, told in (
                ("label", self.label, labels),
                ("text", self.text, set(captions.values())),
            ):
                if column not in (None, name) and not any(told):
                    raise DminError(
                        f"data.{name}={column}: no sample of {self.shards} has such a field, nor a "
                        f".{'cls' if name == 'label' else 'txt'}. Give a field of the .json files, "
                        f"or set data.{name}=null."
                    )
            problems = self.lacking(captions) | problems
        return problems

    def _lacks(self, id: str, parts: Container[str]) -> str | None:
        """Return why a sample is unusable by name or number of images, or None."""
        if printable(id) != id:
            return NO_TEXT
        if (count := sum(kind in parts for kind in IMAGES)) != 1:
            return f"it has {count or 'no'} images ({', '.join(IMAGES)})"
        given = sum(f"{GIVEN}{kind}" in parts for kind in IMAGES)
        return NO_PARTNER if self.condition_image is not None and given != 1 else None

    def _survey(self) -> dict[Path, dict[str, Any]]:
        """Return the result of :meth:`_look` for each shard, by folder and name."""
        settings: dict[str, Any] = {"checked": self.check, "schema": SCHEMA, "sums": 2}
        settings.update(text=self.text, label=self.label, condition_image=self.condition_image)
        if self.check:
            settings.update(max_pixels=self.max_pixels, **self.settings())
        shards = {}
        for folder in sorted({path.parent for path in self.paths}):
            names = [path.name for path in self.paths if path.parent == folder]
            shards[folder], problems = survey(folder, names, self._look, settings)
            for name, reason in problems.items():
                raise Unreadable(str(folder / name), reason)
            for *_, sums in shards[folder].values():
                self.sums |= {id: digits for id, (digits, _) in sums.items()}
        return shards

    def _look(self, path: Path, name: str) -> tuple[str, str, dict[str, str], dict[str, Any]]:
        """Return a shard's two digests, problems of its samples, and sums of the other samples."""
        problems, rows, sums = {}, [], {}
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                for id, parts in self._parts[path].items():
                    if self._lacks(id, parts):
                        continue
                    try:
                        content = _read(file, parts)
                        sizes = [self.probe(i, id) for i in _images(content) if self.check]
                        if reason := unlike(*sizes):
                            raise Unreadable(id, reason)
                        said = self._facts(content, id)[:2]
                        row = _row(id, content, said)
                        digits = hashlib.sha256(json.dumps(row).encode()).hexdigest()[:16]
                        sums[id] = digits, [None if each is None else "there" for each in said]
                        rows.append(row)
                    except DminError as error:
                        problems[id] = getattr(error, "reason", str(error)).rstrip(".")
        except OSError as error:
            raise Unreadable(name, (error.strerror or type(error).__name__).lower()) from error
        return digest, hashlib.sha256(json.dumps(rows).encode()).hexdigest(), problems, sums


def _index(
    path: Path, named: Mapping[str, str], unread: Counter[str]
) -> Iterator[tuple[str, dict[str, Part]]]:
    """Yield the position of each sample's files in a shard, by key and by new name of the kind."""
    samples: dict[str, dict[str, Part]] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                if not member.isreg() or not stem or not kind:
                    unread["without a key or suffix"] += not member.isdir()
                    continue
                key = f"{folder}/{stem}".removeprefix("./").removeprefix("/")
                parts = samples.setdefault(key, {})
                if kind.lower() in parts:
                    raise DminError(f"{path} holds {member.name} twice. Write the shard again.")
                parts[kind.lower()] = Part(member.offset_data, member.size)
                unread[f".{kind.lower()}"] += kind.lower() not in named
    except (tarfile.TarError, OSError) as error:
        raise DminError(
            f"{path} cannot be read as a tar file ({error}). Decompress it if it is compressed; "
            f"download it again if it is truncated."
        ) from error
    with path.open("rb") as file:
        file.seek(end)
        # tarfile does not detect a file that is truncated between two samples.
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise DminError(f"{path} is truncated: a tar file ends in zeros. Download it again.")
    if not samples:
        raise DminError(f"{path} holds no samples: no files such as 000.jpg and 000.txt in it.")
    for key, parts in samples.items():
        yield key, {name: parts[kind] for kind, name in named.items() if kind in parts}


def _read(file: BinaryIO, parts: dict[str, Part]) -> dict[str, bytes]:
    """Return the content of a sample's files."""
    content = {}
    for kind, part in parts.items():
        file.seek(part.start)
        content[kind] = file.read(part.size)
    return content


def _read_sample(path: Path, parts: dict[str, Part]) -> dict[str, bytes]:
    """Return the content of a sample's files; refuse a shard that is gone or became shorter."""
    # Opened anew each time, since loader processes would share the position in an open file.
    with naming("read", path), path.open("rb") as file:
        content = _read(file, parts)
    if any(len(content[kind]) < part.size for kind, part in parts.items()):
        raise Unreadable(str(path), "it is shorter than when the data were surveyed")
    return content


def _images(content: dict[str, bytes]) -> list[bytes]:
    """Return the image of a sample, and its condition image, if any."""
    return [each for kind, each in content.items() if kind not in _TEXTS]


def _row(id: str, content: dict[str, bytes], said: Sequence[Any]) -> list[Any]:
    """Return what gradients of a sample depend on."""
    image, *given = (hashlib.sha256(each).hexdigest() for each in _images(content))
    return [id, image, *said, *given]
