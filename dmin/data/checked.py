"""Datasets that read all images first: unreadable ones are refused or left out by name."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmin.data.base import SCHEMA, Dataset
from dmin.data.ids import facts_of, ids_of
from dmin.data.pixels import Pixels
from dmin.runtime.errors import DminError, DminWarning

NO_TEXT = "its name is not UTF-8, so no store can hold it: rename the file"
NO_CAPTION = "it has no caption, and others have"


@dataclass(kw_only=True)
class Checked(Pixels):
    """Image files, and how to handle images that cannot be used.

    These are images that cannot be read, have metadata that a store cannot keep (NaN, broken
    lines), or have no caption while others have one.

    Args:
        on_error: ``raise`` refuses the dataset. ``skip`` leaves such images out before collecting,
            so that ids and blocks of the others do not change later; they are counted, listed in
            ``skipped`` and named in the manifest of every store.
        check: read all images when the dataset is created. Otherwise a damaged image is found only
            when it is needed, perhaps hours later.

    Attributes:
        skipped: names of the images left out, with reasons.
        sums: first digits of the SHA-256 of each surveyed example, by id.
    """

    on_error: Literal["raise", "skip"] = "raise"
    check: bool = True

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        super().__post_init__()
        if self.on_error not in ("raise", "skip"):
            raise DminError(f"data.on_error={self.on_error!r}: choose one of raise, skip.")
        if self.on_error == "skip" and not self.check:
            raise DminError(
                "data.on_error=skip needs to read all images first: set data.check=true."
            )
        self.skipped: dict[str, str] = {}
        self.sums: dict[str, str] = {}

    def leave_out(self, problems: dict[str, str], images: int, where: str) -> None:
        """Leave out images that cannot be used, with a warning, if ``on_error`` is ``skip``.

        Args:
            problems: reasons by name of the image.
            images: number of all images.
            where: the dataset as the user named it.

        Raises:
            DminError: ``on_error`` is ``raise``, or no image would be left.
        """
        self.skipped = problems
        if not problems:
            return
        message = describe_problems(problems, images, where)
        if self.on_error == "raise":
            raise DminError(
                f"{message} Fix them, remove them (from the metadata too), or leave them out with "
                f"data.on_error=skip."
            )
        if len(problems) == images:
            raise DminError(message)
        warnings.warn(f"{message} They are left out.", DminWarning, stacklevel=5)

    def lacking(self, captions: Mapping[str, str | None]) -> dict[str, str]:
        """Return the images to leave out because only others have captions, with the reason."""
        some = self.on_error == "skip" and any(each is not None for each in captions.values())
        return {id: NO_CAPTION for id, caption in captions.items() if some and caption is None}

    def described(self, examples: int, **content: Any) -> dict[str, Any]:
        """Return settings, the given content, and the names of images left out, as JSON."""
        name = type(self).__name__
        settings = {"schema": SCHEMA, "name": name, "examples": examples, **self.settings()}
        if not self.upscale and self.bucket_shapes is None:
            settings["sides"] = "multiples of bucket_step"  # earlier versions used buckets
        skipped = [printable(name) for name in sorted(self.skipped)]
        return {**settings, **content, "skipped": skipped}


def require_same(id: str, content: bytes, known: str) -> None:
    """Refuse an example that has changed since it was surveyed.

    Args:
        id: id of the example.
        content: its current content.
        known: first digits of the content's SHA-256 in the survey; empty if not surveyed.

    Raises:
        DminError: the content has changed.
    """
    if not hashlib.sha256(content).hexdigest().startswith(known):
        raise DminError(
            f"{printable(id)} has changed since the data were surveyed. Restore it and run the "
            f"command again, or start a new store with the changed data."
        )


def describe_problems(problems: dict[str, str], images: int, where: str) -> str:
    """Return a sentence that names images that cannot be used."""
    few = [f"{printable(name)} ({reason})" for name, reason in sorted(problems.items())[:3]]
    more = ", …" if len(problems) > len(few) else ""
    return (
        f"{len(problems)} of the {images} image(s) of {where} cannot be used: "
        f"{', '.join(few)}{more}."
    )


def printable(name: str) -> str:
    """Return a file name that can be printed; Linux allows bytes that are not text."""
    return name.encode(errors="backslashreplace").decode()


def not_read(parts: Iterable[str]) -> str:
    """Return the line that names parts of a dataset that are not read; empty if there are none."""
    kinds = [printable(part) for part in parts if not part.startswith("0 ")]
    more = f", and {len(kinds) - 8} more" if len(kinds) > 8 else ""
    return f"not read: {', '.join(kinds[:8])}{more}" if kinds else ""


def require_captions(
    dataset: Dataset, model: str, setting: str = "data", empty: bool = False
) -> None:
    """Refuse images without the captions that a model is conditioned on.

    Args:
        dataset: a dataset, best with ``facts``, which gives captions without reading images.
        model: name of the model in messages.
        setting: the configuration group of the dataset, such as ``data``.
        empty: allow empty captions.

    Raises:
        DminError: some images have none; the message has their number, the first, and a remedy.
    """
    captions = zip(ids_of(dataset), (facts.caption for facts in facts_of(dataset)), strict=True)
    lacking = {id: c for id, c in captions if c is None or not (empty or c.strip())}
    if not lacking:
        return
    few = ", ".join(map(printable, list(lacking)[:3])) + (", …" if len(lacking) > 3 else "")
    text = Path(getattr(dataset, "root", ""), next(iter(lacking))).with_suffix(".txt")
    remedy = (
        "Add a caption for each to the column text of metadata.jsonl (another column: "
        f"{setting}.text=COLUMN), or remove its line, which leaves the image out."
    )
    if setting == "data" and text.is_file():
        remedy = f"They seem to be in files such as {text.name}, which data=training_folder reads."
    elif setting == "queries":
        remedy = "Give them: --prompt (queries.prompt=…), or text in a metadata.jsonl next to them."
    elif None not in lacking.values():
        remedy = "Add them, or set model.empty_captions=keep if it was trained without some."
    raise DminError(
        f"{len(lacking):,} of the {len(dataset):,} images of {setting} have no caption ({few}), "
        f"and {model} is conditioned on captions. {remedy}"
    )
