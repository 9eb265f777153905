"""Classify the files of a folder: examples, captions, masks, metadata, or ignored with a reason."""

import os
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from dmin.data.base import Facts
from dmin.data.captions import Captions
from dmin.data.formats import is_image, why_not_opened
from dmin.data.metadata import NAMES, Column, Refuse, read_facts, read_rows
from dmin.data.survey import files_below
from dmin.data.texts import parse_json, read_text
from dmin.runtime.errors import DminError, DminWarning
from dmin.runtime.escape import printable

BESIDE = (".txt", ".caption", ".json")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "auto": (),
    "metadata": NAMES,
    "beside": BESIDE,
    "txt": BESIDE[:1],
    "caption": BESIDE[1:2],
    "json": BESIDE[2:],
    "table": ("metadata.json", "captions.json"),
    "kohya": BESIDE[:2],
    "labels": (),
    "plain": NAMES,
}
"""Where captions and labels are: names of metadata files, or suffixes of files next to images.

``plain`` reads only metadata files or names of subfolders, as earlier versions did.
"""
PLAIN = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_MASKS, _MASK_FOLDER = ("-masklabel", "-condlabel"), re.compile("(^|/)masks?/")
_MASK = "masks, not examples: data=masked_folder uses them"
_NUMBERS = re.compile(r"(?=.*\s)[-+.\deE\s]+", re.DOTALL)  # such as bounding boxes


@dataclass
class Folder:
    """The files of a folder, classified.

    Args:
        root: the folder.
        suffixes: suffixes of images; None for all formats that can be opened.
        recursive: whether subfolders are read.
        leave: endings of the names of files that are not examples, and names of folders of such
            files, followed by ``/``; None recognises masks by their usual names.
        condition_image: folder of the condition images, or metadata column with their names.

    Attributes:
        files: paths below the folder of all files that may be read.
        images: files that may be examples.
        used: files with captions, metadata or condition images.
        layout: one of `LAYOUTS`, after :meth:`read`.
    """

    root: Path
    suffixes: Sequence[str] | None = None
    recursive: bool = True
    leave: Sequence[str] | None = None
    condition_image: str | Path | None = None
    used: set[str] = field(default_factory=set)
    layout: str = "auto"
    noun: str = "images"

    def __post_init__(self) -> None:
        """List the files."""
        self._why: dict[str, str] = {}
        self.files: list[str] = list(files_below(self.root, self._why))
        if not self.recursive:
            self._why |= {file: "in folders below" for file in self.files if "/" in file}
            self.files = [file for file in self.files if "/" not in file]
        self._spelt = {_folded(file): file for file in self.files}
        images = self._candidates()
        inside = f"{self.condition_image or '.'}/"  # no path begins with a dot
        self.used.update(image for image in images if image.startswith(inside))
        images = [image for image in images if image not in self.used]
        masks = set(self._masks(images))
        self._why |= dict.fromkeys(masks, _MASK)
        self.images: list[str] = [image for image in images if image not in masks]

    def _candidates(self) -> list[str]:
        known = None if self.suffixes is None else tuple(self.suffixes)
        if known is None:
            return [file for file in self.files if is_image(f"{self.root}/{file}")]
        return [file for file in self.files if file.lower().endswith(known)]

    def _stem(self, example: str) -> str:
        """Return the path, without suffix, of files next to an example."""
        return os.path.splitext(example)[0]

    def _masks(self, images: Sequence[str]) -> list[str]:
        if self.leave is not None:
            inside = [f"/{each}" for each in self.leave if each.endswith("/")]
            ends = tuple(self.leave)
            return [i for i in images if i.endswith(ends) or any(f in f"/{i}" for f in inside)]
        beside = [i for i in images if os.path.splitext(i)[0].endswith(_MASKS)]
        apart = [i for i in images if _MASK_FOLDER.search(i)]
        if not apart:
            return beside
        stems = {PurePosixPath(i).stem for i in set(images).difference(beside, apart)}
        of = [i for i in apart if PurePosixPath(i).stem in stems]
        if of and len(of) < len(apart):
            odd = next(i for i in apart if i not in of)
            raise DminError(
                f"data.root={self.root}: {printable(odd)} looks like a mask in its folder, "
                f"but no image has its name. Rename the folder if it contains "
                f"examples; or exclude it: data=training_folder data.leave=[masks/]."
            )
        return beside + of

    def read(self, layout: str, label: Column, text: Column, refuse: Refuse) -> dict[str, Facts]:
        """Return caption, label and metadata of each example.

        Args:
            layout: one of `LAYOUTS`.
            label: column of the label; None for none.
            text: column of the caption; None for none.
            refuse: receives examples whose captions or metadata cannot be used.

        Raises:
            DminError: the layout is ambiguous, or captions or metadata are invalid.
        """
        if layout not in LAYOUTS:
            raise DminError(f"data.layout={layout!r}: choose one of {', '.join(LAYOUTS)}.")
        self.layout = self._found(text) if layout == "auto" else layout
        if layout == "plain":
            self.layout = "metadata" if self._tables(NAMES) else "labels"
        if self.layout == "metadata":
            facts = self._by_metadata(label, text, refuse)
            sure = layout != "auto" or any(f.caption is not None for f in facts.values())
            if not sure and (others := self._sources(text)):
                self._ask(["metadata", *others], "the metadata have no captions, other files may")
            return facts
        told = self._by_table() if self.layout == "table" else self._by_files(label, text, refuse)
        texts = [each.caption or "" for each in told.values()]
        if layout == "auto" and texts and all(_NUMBERS.fullmatch(each) for each in texts):
            self._ask([self.layout, "labels"], "the texts beside them are only numbers")
        facts = {}
        for image in self.images:
            known, folder = told.get(image, Facts()), os.path.dirname(image)
            if self.layout == "kohya":
                repeats, tokens = _class_tokens(image) or ("0", "")
                caption = tokens if known.caption is None and text is not None else known.caption
                if int(repeats):
                    facts[image] = Facts(None, caption, repeats=int(repeats))
            # Folders of img2dataset, whose .json files have a key, are only numbers.
            elif known.label is None and label is not None and "key" not in (known.metadata or ()):
                facts[image] = known._replace(label=folder or None)
            else:
                facts[image] = known
        return facts

    def beside(self, suffix: str) -> dict[str, str]:
        """Return, for each image that has one, the file with its stem and this suffix."""
        names = {i: _folded(f"{self._stem(i)}{suffix}") for i in self.images}
        return {i: self._spelt[name] for i, name in names.items() if name in self._spelt}

    def summary(self, examples: Mapping[str, Facts]) -> str:
        """Return the layout, counts and the ignored files, on one line."""
        captions = sum(f.caption is not None for f in examples.values())
        labels = len({f.label for f in examples.values()} - {None})
        parts = [f"{len(examples):,} {self.noun}", f"layout {self.layout}"]
        parts += [f"{captions:,} captions"] * bool(captions) + [f"{labels:,} labels"] * bool(labels)
        beside = {file for suffix in BESIDE for file in self.beside(suffix).values()}
        told = [
            (self.images, f"{self.noun} left out"),
            (beside, f"beside images, which layout {self.layout} does not read"),
        ]
        reasons = {file: reason for files, reason in told for file in files} | self._why
        why: dict[str, list[str]] = {}
        for file in dict.fromkeys([*self.files, *self._why]):
            if file not in examples and file not in self.used:
                text = file.lower().endswith(BESIDE[:2])
                other = "texts without an image" if text else "not in an image format"
                reason = reasons.get(file) or why_not_opened(file) or other
                why.setdefault(reason, []).append(file)
        for reason, files in why.items():
            few = ", ".join(printable(file) for file in files[:2]) + ", …" * bool(files[2:])
            parts.append(f"{'' if reason == _MASK else 'ignored: '}{len(files):,} {reason} ({few})")
        return " · ".join(parts)

    def _tables(self, names: Sequence[str]) -> list[str]:
        return [file for file in self.files if os.path.basename(file) in names]

    def _sources(self, text: Column) -> list[str]:
        """Return the possible layouts with captions; none if no captions are needed."""
        beside = any(self.beside(suffix) for suffix in BESIDE)
        table = set(self._tables(LAYOUTS["table"])).difference(self.beside(".json").values())
        return [] if text is None else ["beside"] * beside + ["table"] * bool(table)

    def _found(self, text: Column) -> str:
        """Return the layout of the folder; refuse an ambiguous one."""
        if self._tables(NAMES):
            return "metadata"
        found = self._sources(text)
        if len(found) > 1:
            self._ask(found, "there are captions both in files next to the images and in a table")
        classes = {image.partition("/")[0]: _class_tokens(image) for image in self.images}
        if not classes or not all(classes.values()):
            return found[0] if found else "labels"
        # Numbers of classes count up from 1 or have leading zeros, 007; repeats do neither.
        numbers = sorted((each[0] for each in classes.values() if each), key=int)
        counted = len(numbers) > 1 and numbers == [str(n + 1) for n in range(len(numbers))]
        zeros = any(n.startswith("0") for n in numbers)
        if found == ["table"] or (not found and (counted or zeros)):
            reason = f"{next(iter(classes))} may mean repeats and class tokens, or be just a name"
            self._ask(["kohya", *(found or ["labels"])], reason)
        return "kohya"

    def _by_metadata(self, label: Column, text: Column, refuse: Refuse) -> dict[str, Facts]:
        tables, where = self._tables(NAMES), f"the metadata of {self.root}"
        self.used.update(tables)
        # macOS spells é with two characters, most other systems with one: use the name on disk.
        spelt = {unicodedata.normalize("NFC", file): file for file in self.files}
        there, rows = set(self.files), read_rows(self.root, tables, refuse)
        rows = {
            name if name in there else spelt.get(unicodedata.normalize("NFC", name), name): row
            for name, row in rows.items()
        }
        facts = read_facts(rows, where, label, text, refuse)
        for name, row in rows.items():
            if given := row.get(str(self.condition_image or "")):
                self.used.add((PurePosixPath(name).parent / str(given)).as_posix())
        unnamed = [i for i in self.images if i not in facts and i not in self.used]
        if unnamed:
            warnings.warn(
                f"{where} does not name {len(unnamed)} image(s) in the folder, such "
                f"as {printable(unnamed[0])}: they are left out.",
                DminWarning,
                stacklevel=7,
            )
        return facts

    def _by_files(self, label: Column, text: Column, refuse: Refuse) -> dict[str, Facts]:
        """Return facts from files next to images; refuse contradictory captions."""
        rows: dict[str, dict[str, Any]] = {}
        told: dict[str, list[str]] = {}
        suffixes = LAYOUTS[self.layout]
        for suffix in suffixes:
            for image, file in self.beside(suffix).items():
                self.used.add(file)
                try:
                    said = read_text(self.root / file)
                    if suffix == ".json":
                        rows[image] = parse_json(said, str(self.root / file))
                    else:
                        told.setdefault(image, []).append(said.strip())
                except DminError as error:
                    refuse(image, error)
        columns = [text] if isinstance(text, str) else [*(text or ())]
        where, asked = f"the .json files of {self.root}", [*columns, "caption"]
        facts = read_facts(rows, where, label, asked if columns else None, refuse)
        for image, texts in told.items() if columns else ():
            known = facts.get(image, Facts())
            if len({*texts, (known.caption or texts[0]).strip()}) > 1:
                few = [suffix.removeprefix(".") for suffix in suffixes]
                self._ask(few, f"the captions of {printable(image)} differ")
            facts[image] = known._replace(caption=texts[0])
        return facts

    def _by_table(self) -> dict[str, Facts]:
        found: dict[str, Facts] = {}
        for table in self._tables(LAYOUTS["table"]):
            self.used.add(table)
            captions = Captions(source="table", table=self.root / table, missing="drop")
            told = captions.read(self.root, self.images, self.files)
            found |= {image: Facts(caption=caption) for image, caption in told.items()}
        return found

    def _ask(self, choices: Sequence[str], reason: str) -> NoReturn:
        raise DminError(
            f"data.root={self.root} is ambiguous: {reason}. Choose how to read it: "
            f"data.layout={' or data.layout='.join(choices)} (data=training_folder has more)."
        )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.lower())


def _class_tokens(image: str) -> tuple[str, str] | None:
    """Return repeats and class tokens of an image's folder, if that is directly below the root."""
    found = re.fullmatch(r"([0-9]{1,9})_([^/]+)/[^/]+", image)
    return (found[1], found[2].strip()) if found else None
