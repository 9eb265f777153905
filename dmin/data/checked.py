"""Datasets that read all images first: unreadable ones are refused or left out by name."""

import hashlib
import warnings
from collections.abc import Mapping
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
    """Image files with what to do about those that cannot be read.

    Args:
        on_error: ``raise`` refuses the dataset; ``skip`` leaves such images out before anything is
            collected, so that ids and blocks of the others stay the same from then on. They are
            counted, listed in ``skipped`` and named in the manifest of every store. So are those of
            which something is said that cannot be kept (NaN, broken lines), and those without a
            caption where others have one.
        check: read all images when the dataset is made. Off, a damaged one is met only when its
            turn comes, perhaps hours later.

    Attributes:
        skipped: names of those left out, and why.
        sums: beginnings of the SHA-256 of what was surveyed, by id.
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
        """Leave images out if that was asked for.

        Args:
            problems: why each cannot be used, by name.
            images: how many there are in all.
            where: the dataset as the user named it.

        Raises:
            DminError: it was not asked for, or nothing would be left.
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
        """Return which images are to be left out for want of a caption, and why."""
        some = self.on_error == "skip" and any(each is not None for each in captions.values())
        return {id: NO_CAPTION for id, caption in captions.items() if some and caption is None}

    def described(self, examples: int, **content: Any) -> dict[str, Any]:
        """Return settings, what the dataset says of its content, and those left out, as JSON."""
        name = type(self).__name__
        settings = {"schema": SCHEMA, "name": name, "examples": examples, **self.settings()}
        if not self.upscale and self.bucket_shapes is None:
            settings["sides"] = "multiples of bucket_step"  # before, one of the buckets
        skipped = [printable(name) for name in sorted(self.skipped)]
        return {**settings, **content, "skipped": skipped}


def require_same(id: str, content: bytes, known: str) -> None:
    """Refuse an example that is not what was surveyed: what is decoded is what was digested.

    Args:
        id: of the example.
        content: what its sum is of, as it is now.
        known: how the SHA-256 of it began; empty if it was not surveyed.

    Raises:
        DminError: it has changed.
    """
    if not hashlib.sha256(content).hexdigest().startswith(known):
        raise DminError(
            f"{printable(id)} has changed since the data were surveyed. Restore it and run the "
            f"command again, or start a new store with the changed data."
        )


def describe_problems(problems: dict[str, str], images: int, where: str) -> str:
    """Return a sentence that names what cannot be used."""
    few = [f"{printable(name)} ({reason})" for name, reason in sorted(problems.items())[:3]]
    more = ", …" if len(problems) > len(few) else ""
    return (
        f"{len(problems)} of the {images} image(s) of {where} cannot be used: "
        f"{', '.join(few)}{more}."
    )


def printable(name: str) -> str:
    """Return a file name that can be printed: Linux allows bytes that are no text."""
    return name.encode(errors="backslashreplace").decode()


def require_captions(
    dataset: Dataset, model: str, setting: str = "data", empty: bool = False
) -> None:
    """Refuse images without the captions that a model is conditioned on.

    Args:
        dataset: of which captions are known without reading images: one that has ``facts``.
        model: what to call the model.
        setting: what the dataset is called among the settings.
        empty: allow captions of no words.

    Raises:
        DminError: some have none; says how many, the first ones, and what to do.
    """
    captions = zip(ids_of(dataset), (facts.caption for facts in facts_of(dataset)), strict=True)
    lacking = {id: c for id, c in captions if c is None or not (empty or c.strip())}
    if not lacking:
        return
    few = ", ".join(map(printable, list(lacking)[:3])) + (", …" if len(lacking) > 3 else "")
    text = Path(getattr(dataset, "root", ""), next(iter(lacking))).with_suffix(".txt")
    remedy = (
        f"Give each one in the column text of metadata.jsonl ({setting}.text=COLUMN for another), "
        f"or take its line out: images that no line names are left out."
    )
    if setting == "data" and text.is_file():
        remedy = (
            f"They seem to stand in files such as {text.name}: data=training_folder reads these."
        )
    elif setting == "queries":
        remedy = "Say them: --prompt (queries.prompt=…), or text in a metadata.jsonl beside them."
    elif None not in lacking.values():
        remedy = "Add them, or set model.empty_captions=keep if it was trained without some."
    raise DminError(
        f"{len(lacking):,} of the {len(dataset):,} images of {setting} have no caption ({few}), "
        f"and {model} is conditioned on captions. {remedy}"
    )
