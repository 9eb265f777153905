"""Captions in files beside images, as trainers read them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from dmin.data.texts import parse_json, read_text
from dmin.runtime.errors import DminError


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
            ``caption`` and ``tags``.
        missing: what an image without a caption is: an ``error``, left out (``drop``), captioned
            by the ``text``, or by nothing (``empty``).
        empty_is_missing: whether an empty caption counts as none.
        text: see above.
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
    missing: Literal["error", "drop", "text", "empty"] = "error"
    empty_is_missing: bool = False
    text: str | None = None
    rejoin: tuple[str, str] | None = None
    replace: Mapping[str, str] | None = None
    trigger: str | None = None
    prefix: str = ""
    suffix: str = ""

    def read(
        self,
        root: Path,
        images: Sequence[str],
        files: Collection[str],
        refuse: Callable[[str, DminError], None] | None = None,
    ) -> dict[str, str]:
        """Return the captions of images; those to be dropped are left out.

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
        found: dict[str, str] = {}
        without: list[str] = []
        for image in images:
            try:
                caption = self._caption(root, image, stems, table)
            except DminError as error:
                if refuse is None:
                    raise
                refuse(image, error)
                continue
            if caption is None or (self.empty_is_missing and not caption):
                without.append(image)
                caption = {"text": self.text or "", "empty": ""}.get(self.missing)
                if caption is None:
                    continue
            found[image] = f"{self.prefix}{self._worded(caption)}{self.suffix}"
        if without and self.missing == "error":
            raise DminError(
                f"{len(without)} of the {len(images)} images of {root} have no caption "
                f"({' or '.join(self.extensions)} beside them): {', '.join(without[:3])}"
                f"{', …' if len(without) > 3 else ''}. Write them, or say what such an image is: "
                f"data.captions.missing=drop, empty or text (of a run's folder: "
                f"data.datasets.NAME.captions.missing)."
            )
        return found

    def _worded(self, caption: str) -> str:
        changes = [tuple(self.rejoin)] if self.rejoin else []
        for old, new in (*changes, *(self.replace or {}).items()):
            caption = caption.replace(old, new)
        if self.trigger and self.trigger not in caption:
            return f"{self.trigger} {caption}"
        return caption

    def _caption(
        self, root: Path, image: str, stems: dict[str, str], table: dict[str, Any]
    ) -> str | None:
        path = PurePosixPath(image)
        if self.source == "text":
            return self.text
        if self.source == "names":
            return path.stem.replace("_", " ")
        if self.source == "stems":
            return path.stem
        if self.source == "table":
            return _of_table(table, root, image)
        for extension in self.extensions:
            name = stems.get(path.with_suffix(extension).as_posix().lower())
            if name is not None:
                return self._of_file(root / name)
        return None

    def _of_file(self, file: Path) -> str | None:
        text = read_text(file)
        if file.suffix.lower() == ".json":  # as img2dataset writes them
            text = str(parse_json(text, str(file)).get("caption") or "")
        if self.lines == "whole":
            return text.strip()
        lines = [line.strip() for line in text.strip().splitlines()]
        return next(iter(lines), "")

    def _table(self, root: Path) -> dict[str, Any]:
        file = Path(self.table) if self.table is not None else root / "metadata.json"
        return parse_json(read_text(file), str(file))


def _of_table(table: dict[str, Any], root: Path, image: str) -> str | None:
    """Return the caption of an image, which a table names by its path, its name or its stem."""
    path = PurePosixPath(image)
    names = (image, str(root / image), str((root / image).absolute()), path.name, path.stem)
    entry = next((table[name] for name in names if name in table), None)
    if isinstance(entry, list):
        entry = entry[0] if entry else None
    if isinstance(entry, dict):
        parts = [entry.get("caption"), entry.get("tags")]
        return ", ".join(str(part) for part in parts if part) or None
    return None if entry is None else str(entry)
