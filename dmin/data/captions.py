"""Captions as trainers read them, and their random augmentation at each step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np

from dmin.data.metadata import read_table
from dmin.data.texts import parse_json, read_text
from dmin.runtime.errors import DminError

Source = Literal["files", "names", "stems", "table", "text"]
Lines = Literal["whole", "first", "each"]
Missing = Literal["error", "drop", "text", "empty"]


@dataclass(frozen=True)
class Draws:
    """Random augmentation of images and captions in training, approximated by a few draws.

    Draw d of an image depends only on the seed, on its id in its dataset, and on d.

    Args:
        number: number of draws. ``noise.draws`` is this number or a multiple of it; noise draw d
            is combined with data draw d mod ``number``.
        flip: probability of a mirror image.
        crop: crop at a random position instead of the centre.
        lines: use a random one of several captions instead of the first.
        shuffle: shuffle the parts of a caption.
        keep: number of leading parts that are not shuffled.
        drop: probability with which each part is dropped.
        spare: number of leading parts that are never dropped.
        mark: text after the leading parts to keep and spare, and before trailing ones to keep and
            spare; where it occurs, ``keep`` and ``spare`` are ignored.
        separator: text that separates parts.
        joint: text that joins parts again; parts are stripped if it differs from the separator.
        whole: treat a caption's prefix and suffix as parts of it.
        dropout: probability of an empty caption.
        seed: key of all draws.

    Raises:
        DminError: a probability is not in [0, 1], or there is no draw.
    """

    number: int = 1
    flip: float = 0.0
    crop: bool = False
    lines: bool = False
    shuffle: bool = False
    keep: int = 0
    drop: float = 0.0
    spare: int = 0
    mark: str | None = None
    separator: str = ","
    joint: str = ", "
    whole: bool = False
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse invalid settings."""
        shares = {name: getattr(self, name) for name in ("flip", "drop", "dropout")}
        odd = [f"data.draws.{n}={v}: give a share from 0 to 1." for n, v in shares.items()]
        odd = [told for told, v in zip(odd, shares.values(), strict=True) if not 0 <= v <= 1]
        if self.number < 1:
            odd.append(f"data.draws.number={self.number}: give 1 or more.")
        if odd:
            raise DminError(odd[0])

    def of(self, id: str, draw: int) -> np.random.Generator:
        """Return the random generator of one draw of an image; only ``random()`` is used."""
        digest = hashlib.sha256(f"{self.seed}\n{draw}\n{id}".encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16])))

    def view(self, rng: np.random.Generator) -> tuple[tuple[float, float], bool]:
        """Draw the crop position, as fractions of the free range (across, down), and a flip."""
        mirrored, across, down = rng.random(3).tolist()
        return (across, down) if self.crop else (0.5, 0.5), mirrored < self.flip

    def parts(self, text: str, rng: np.random.Generator) -> str:
        """Draw the parts of a caption that are used, and their order."""
        if not self.shuffle and not self.drop:
            return text
        marked = text.split(self.mark, 2) if self.mark else []
        several = len(marked) > 1  # whether the mark occurs
        first, middle, *last = map(self._split, marked if several else ["", text])
        keep, spare = (0, 0) if several else (self.keep, self.spare)
        dropped, places = rng.random((2, len(middle))).tolist()
        order = list(range(len(middle)))
        if self.shuffle:
            order[keep:] = sorted(order[keep:], key=places.__getitem__)
        drawn = [middle[n] for n in order if n < spare or dropped[n] >= self.drop]
        return self.joint.join([*first, *drawn, *(part for each in last for part in each)])

    def _split(self, text: str) -> list[str]:
        parts = text.split(self.separator)
        if self.joint == self.separator:
            return parts if text else []
        return [part.strip() for part in parts if part.strip()]


@dataclass(frozen=True)
class Captions:
    """Where the captions of images are, and how they are changed.

    Args:
        source: ``files``: files next to the images with the same stem. ``names``: names of the
            images, with ``_`` replaced by a space. ``stems``: unchanged names without suffix.
            ``table``: a table of captions by image. ``text``: one text for all.
        extensions: suffixes of caption files; the first that exists is used.
        lines: ``whole`` is the whole text, ``first`` its first line; with ``each`` every line is
            a caption, and the first is used unless another is drawn.
        table: a JSON file that maps each image to a caption (``{"a.png": "caption"}``), to a list
            of captions, or to an object with ``caption`` and ``tags``; or a ``.jsonl``, ``.csv`` or
            ``.parquet`` file.
        key: column of such a file that names the image by path, name or stem.
        columns: the first of these columns that is not empty is the caption; if empty:
            ``caption`` and ``tags``, joined.
        missing: for an image without caption: ``error``, ``drop`` (leave it out), ``text`` (use
            that text) or ``empty`` (use an empty caption).
        empty_is_missing: whether an empty caption counts as missing.
        text: the text for ``source="text"`` and ``missing="text"``.
        others: alternatives to ``text`` with equal probability, for draws.
        rejoin: a separator and its replacement.
        replace: further texts and their replacements.
        trigger: words to put before captions that do not contain them, followed by a space.
        prefix: text put before every caption, after the changes above.
        suffix: text put after every caption.

    Raises:
        DminError: ``source``, ``lines`` or ``missing`` is none of the above.
    """

    source: Source = "files"
    extensions: Sequence[str] = (".txt",)
    lines: Lines = "whole"
    table: str | Path | None = None
    key: str = "file_name"
    columns: Sequence[str] = ()
    missing: Missing = "error"
    empty_is_missing: bool = False
    text: str | None = None
    others: Sequence[str] = ()
    rejoin: tuple[str, str] | None = None
    replace: Mapping[str, str] | None = None
    trigger: str | None = None
    prefix: str = ""
    suffix: str = ""

    def __post_init__(self) -> None:
        """Refuse unknown choices."""
        for name, kind in (("source", Source), ("lines", Lines), ("missing", Missing)):
            value, allowed = getattr(self, name), get_args(kind)
            if value not in allowed:
                raise DminError(
                    f"data.captions.{name}={value!r}: choose one of {', '.join(allowed)}."
                )

    def choices(
        self,
        root: Path,
        images: Sequence[str],
        files: Collection[str],
        refuse: Callable[[str, DminError], None] | None = None,
    ) -> dict[str, list[str]]:
        """Return all captions of each image, unchanged; images to be dropped are missing.

        The first of each, after :meth:`worded`, is the caption; draws may use another.

        Args:
            root: the folder of the images.
            images: their paths below it.
            files: paths of all files below it.
            refuse: receives images whose captions cannot be used; None raises an error instead.

        Raises:
            DminError: a caption is missing and ``missing`` is ``error``, or a file cannot be read.
        """
        stems = {file.lower(): file for file in files}
        table = self._table(root) if self.source == "table" else {}
        found: dict[str, list[str]] = {}
        without: list[str] = []
        for image in images:
            try:
                captions = self._captions(root, image, stems, table)
            except DminError as error:
                if refuse is None:
                    raise
                refuse(image, error)
                continue
            if not captions or (self.empty_is_missing and not captions[0]):
                without.append(image)
                instead = {"text": self.text or "", "empty": ""}.get(self.missing)
                if instead is None:
                    continue
                captions = [instead]
            found[image] = captions
        if without and self.missing == "error":
            files = f"{' or '.join(self.extensions)} beside them"
            raise DminError(
                f"{len(without)} of the {len(images)} images of {root} have no caption "
                f"({f'in {self.table}' if table else files}): {', '.join(without[:3])}"
                f"{', …' if len(without) > 3 else ''}. Write them, or choose what to do with such "
                f"images: data.captions.missing=drop, empty or text (for a folder of a run: "
                f"data.datasets.NAME.captions.missing)."
            )
        return found

    def read(self, root: Path, images: Sequence[str], files: Collection[str]) -> dict[str, str]:
        """Return the captions of images; arguments as for :meth:`choices`."""
        found = self.choices(root, images, files)
        return {image: self.worded(captions) for image, captions in found.items()}

    def worded(self, captions: Sequence[str], draws: Draws | None = None, rng: Any = None) -> str:
        """Return the caption of an image with the trainer's changes.

        Args:
            captions: the unchanged captions of the image.
            draws: random augmentation; None uses the first caption without any.
            rng: generator of the draw.
        """
        caption, prefix, suffix = captions[0], self.prefix, self.suffix
        if draws is not None:
            dropped, which = rng.random(2).tolist()
            if dropped < draws.dropout:
                return ""
            caption = captions[int(which * len(captions)) if draws.lines else 0]
            if draws.whole:
                caption, prefix, suffix = f"{prefix}{caption}{suffix}", "", ""
            caption = draws.parts(caption, rng)
        changes = [tuple(self.rejoin)] if self.rejoin else []
        for old, new in (*changes, *(self.replace or {}).items()):
            caption = caption.replace(old, new)
        if self.trigger and self.trigger not in caption:
            caption = f"{self.trigger} {caption}"
        return f"{prefix}{caption}{suffix}"

    def _captions(
        self, root: Path, image: str, stems: dict[str, str], table: dict[str, Any]
    ) -> list[str]:
        path = PurePosixPath(image)
        if self.source == "text":
            return [] if self.text is None else [self.text, *self.others]
        if self.source == "names":
            return [path.stem.replace("_", " ")]
        if self.source == "stems":
            return [path.stem]
        if self.source == "table":
            return _of_table(table, root, image)
        for extension in self.extensions:
            name = stems.get(path.with_suffix(extension).as_posix().lower())
            if name is not None:
                return self._of_file(root / name)
        return []

    def _of_file(self, file: Path) -> list[str]:
        text = read_text(file)
        if file.suffix.lower() == ".json":  # as img2dataset writes them
            text = str(parse_json(text, str(file)).get("caption") or "")
        if self.lines == "whole":
            return [text.strip()]
        return [line.strip() for line in text.splitlines() if line.strip()] or [""]

    def _table(self, root: Path) -> dict[str, Any]:
        file = Path(self.table) if self.table is not None else root / "metadata.json"
        if file.suffix.lower() == ".json":
            return parse_json(read_text(file), str(file))
        return read_table(file, self.key, self.columns)


def _of_table(table: dict[str, Any], root: Path, image: str) -> list[str]:
    """Return the captions of an image from a table with its path, name or stem as key."""
    path = PurePosixPath(image)
    whole = (image, str(root / image), str((root / image).absolute()))
    names = (*whole, path.with_suffix("").as_posix(), path.name, path.stem)
    entry = next((table[name] for name in names if name in table), None)
    if isinstance(entry, dict):
        parts = [entry.get("caption"), entry.get("tags")]
        entry = ", ".join(str(part) for part in parts if part) or None
    entries = entry if isinstance(entry, list) else [entry]
    return [str(each) for each in entries if each is not None]
