"""Captions as trainers read them, and their random augmentation at each step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from dmin.data.metadata import read_table
from dmin.data.texts import parse_json, read_text
from dmin.runtime.errors import DminError


@dataclass(frozen=True)
class Draws:
    """What training drew anew each time it saw an image; so many draws stand for all of them.

    Draw d of an image is decided by the seed, its id in its dataset, and d.

    Args:
        number: of draws; ``noise.draws`` is as many, or a multiple, and draw d of the noise sees
            draw d of the data.
        flip: share of mirror images.
        crop: whether the place that is cut out is drawn, not the middle.
        lines: whether one of several captions is drawn, not the first.
        shuffle: whether the parts of a caption change places.
        keep: parts at the front that do not.
        drop: share of the parts that are left out.
        spare: parts at the front that are not.
        mark: text behind the parts to keep and spare, and before further ones; wins over numbers.
        separator: between parts.
        joint: in place of it, and of the blanks around parts.
        whole: whether a caption's prefix and suffix are parts of it.
        dropout: share of captions that are empty.
        seed: of all draws.

    Raises:
        DminError: a share is none, or there is no draw.
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
        """Refuse what cannot be drawn."""
        shares = {name: getattr(self, name) for name in ("flip", "drop", "dropout")}
        odd = [f"data.draws.{n}={v}: give a share from 0 to 1." for n, v in shares.items()]
        odd = [told for told, v in zip(odd, shares.values(), strict=True) if not 0 <= v <= 1]
        if self.number < 1:
            odd.append(f"data.draws.number={self.number}: give 1 or more.")
        if odd:
            raise DminError(odd[0])

    def of(self, id: str, draw: int) -> np.random.Generator:
        """Return the source of all chance in a draw of an image; only ``random()`` is asked."""
        digest = hashlib.sha256(f"{self.seed}\n{draw}\n{id}".encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16])))

    def view(self, rng: np.random.Generator) -> tuple[tuple[float, float], bool]:
        """Draw where an image is cut, in shares of what is left over, and if it is mirrored."""
        mirrored, across, down = rng.random(3).tolist()
        return (across, down) if self.crop else (0.5, 0.5), mirrored < self.flip

    def parts(self, text: str, rng: np.random.Generator) -> str:
        """Draw which parts of a caption there are, and in which order."""
        if not self.shuffle and not self.drop:
            return text
        marked = text.split(self.mark, 2) if self.mark else []
        several = len(marked) > 1  # else there is no mark
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
    """How the caption of an image is found, and what is made of it.

    Args:
        source: ``files`` beside the images, of the same stem; ``names`` of the images, a blank for
            each ``_``; ``stems``, their names as they are; a ``table``: JSON of captions by image;
            or ``text``, the same for all.
        extensions: of the files, the first that is there.
        lines: ``whole`` takes the text as it is, ``first`` its first line, ``each`` has every line
            for a caption of its own, of which the first stands for all.
        table: the JSON file: ``{"a.png": "caption"}``, a list of captions, or a mapping with
            ``caption`` and ``tags``; or ``.jsonl``, ``.csv`` or ``.parquet``.
        key: of these, the column that names each image: its path, its name or its stem.
        columns: of which the first that says something is the caption; none: ``caption``, ``tags``.
        missing: what an image without a caption is: an ``error``, left out (``drop``), captioned
            by the ``text``, or by nothing (``empty``).
        empty_is_missing: whether an empty caption counts as none.
        text: see above.
        others: texts that were as likely as that one, of which draws may take one.
        rejoin: a separator, and what stands in its place.
        replace: text in captions, and what stands in its place.
        trigger: words put in front, and a blank, of a caption in which they are nowhere.
        prefix: before every caption, as it stands, after all that.
        suffix: behind it.

    Raises:
        DminError: a choice is none that there is.
    """

    source: Literal["files", "names", "stems", "table", "text"] = "files"
    extensions: Sequence[str] = (".txt",)
    lines: Literal["whole", "first", "each"] = "whole"
    table: str | Path | None = None
    key: str = "file_name"
    columns: Sequence[str] = ()
    missing: Literal["error", "drop", "text", "empty"] = "error"
    empty_is_missing: bool = False
    text: str | None = None
    others: Sequence[str] = ()
    rejoin: tuple[str, str] | None = None
    replace: Mapping[str, str] | None = None
    trigger: str | None = None
    prefix: str = ""
    suffix: str = ""

    def choices(
        self,
        root: Path,
        images: Sequence[str],
        files: Collection[str],
        refuse: Callable[[str, DminError], None] | None = None,
    ) -> dict[str, list[str]]:
        """Return the captions of images, as they stand; those to be dropped are left out.

        The first of each is the caption, once it is `worded`; draws may take another.

        Args:
            root: the folder.
            images: their paths below it.
            files: paths of all files below it.
            refuse: is told of captions that cannot be used, in place of an error.

        Raises:
            DminError: an image has none, and that is an error; or a file cannot be read.
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
        """Return the caption of an image as its trainer words it.

        Args:
            captions: of the image, as they stand.
            draws: what is drawn of them; None: the first, as it is written.
            rng: source of the draws.
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
    """Return the captions of an image, which a table names by its path, its name or its stem."""
    path = PurePosixPath(image)
    whole = (image, str(root / image), str((root / image).absolute()))
    names = (*whole, path.with_suffix("").as_posix(), path.name, path.stem)
    entry = next((table[name] for name in names if name in table), None)
    if isinstance(entry, dict):
        parts = [entry.get("caption"), entry.get("tags")]
        entry = ", ".join(str(part) for part in parts if part) or None
    entries = entry if isinstance(entry, list) else [entry]
    return [str(each) for each in entries if each is not None]
