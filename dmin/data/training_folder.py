"""A folder as a trainer reads it, and several folders together."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal  # noqa: F401 (Literal: see the annotations of Pixels)

from torch import Tensor

from dmin.data.base import Dataset, Example, Facts, describe_dataset
from dmin.data.captions import Captions, Draws
from dmin.data.checked import NO_CAPTION, require_same
from dmin.data.ids import facts_at, ids_of
from dmin.data.image_folder import ImageFolder
from dmin.data.layout import Folder
from dmin.data.masks import Masks
from dmin.data.pixels import Pixels
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import fingerprint


@dataclass(eq=False)
class TrainingFolder(ImageFolder):
    """The images of a folder with captions as a trainer reads them.

    Args:
        root: the folder.
        captions: where captions are, and how they are changed; None for no captions.
        recursive: whether subfolders are read.
        suffixes: suffixes of images; None for all formats that can be opened.
        leave: endings of the names of files that are not examples, such as ``-masklabel.png``,
            and names of folders of such files, followed by ``/``.
        repeats: number of times that an epoch uses each image; kept with the example.
        masks: masks of the loss; None for none.
    """

    root: str | Path
    _: KW_ONLY
    captions: Captions | None = None
    recursive: bool = False
    suffixes: Sequence[str] | None = None
    leave: Sequence[str] = ()
    repeats: float = 1.0
    masks: Masks | None = None

    def __post_init__(self) -> None:
        """Find the images, their captions and masks."""
        self._said: dict[str, str] = {}
        self._cut = Pixels(**{**self.settings(), "mode": "RGB"})
        super().__post_init__()
        for image in self.skipped:
            self._masks.pop(image, None)

    def _problems_beside(self, names: Iterable[str]) -> dict[str, str]:
        """Return also the images whose masks cannot be used, with reasons."""
        problems, how, skip = super()._problems_beside(names), self.masks, self.on_error == "skip"
        some = None if how is None else replace(how, required=how.required and not skip)
        root = Path(self.root)
        self._masks: dict[str, Path] = {} if some is None else some.find(root, sorted(names))
        if how is not None and how.required:
            problems |= {id: "it has no mask" for id in names if id not in self._masks}
        for image in self._masks if self.check else ():
            try:
                self._mask(image)
            except DminError as error:
                problems[image] = str(error).rstrip(".")
        return problems

    def _mask(self, image: str) -> Tensor | None:
        if self.masks is None or image not in self._masks:
            return None
        file = self._masks[image]
        if image in self._said:
            require_same(str(file), self.masks.content(file), self._said[image])
        cut = copy.copy(self._cut)
        cut.at, cut.mirrored = self.at, self.mirrored
        return self.masks.read(file, Path(self.root) / image, cut)

    def _example(self, index: int) -> Example:
        example = super()._example(index)
        return replace(example, mask=self._mask(example.id))

    def _worded(self, example: Example, draws: Draws, rng: Any) -> str:
        return (self.captions or Captions()).worded(self._choices[example.id], draws, rng)

    def describe(self) -> dict[str, Any]:
        """Return the description of :class:`ImageFolder`, and the digests of the masks."""
        found = super().describe()
        if self.masks is not None:
            self._said = {name: self.masks.digest(file) for name, file in self._masks.items()}
            found["masks"] = self._said
        if self.draws is not None and self.draws.lines:
            found["captions"] = fingerprint({name: self._choices.get(name) for name in self.ids})
        return found

    def _find(self) -> dict[str, Facts]:
        folder = Folder(
            Path(self.root), self.suffixes, self.recursive, self.leave, self.condition_image
        )
        self._files = folder
        self._choices: dict[str, list[str]] = {}
        facts = {image: Facts(metadata={}, repeats=self.repeats) for image in folder.images}
        if self.captions is not None:
            folder.layout = self.captions.source
            how = self.captions
            if self.on_error == "skip" and how.missing == "error":
                how = replace(how, missing="drop")
            found = how.choices(folder.root, folder.images, folder.files, self.told_wrong)
            self._choices = found
            lost = [] if how is self.captions else [i for i in folder.images if i not in found]
            self._wrong = {**dict.fromkeys(lost, NO_CAPTION), **self._wrong}
            facts = {
                image: Facts(None, how.worded(captions), {}, self.repeats)
                for image, captions in found.items()
            }
            for suffix in self.captions.extensions if folder.layout == "files" else ():
                folder.used.update(folder.beside(suffix).values())
        return facts


class Together:
    """Several datasets joined to one; an example's id begins with the name of its dataset.

    Args:
        datasets: datasets by name, in order.
        approximated: augmentation in training that is omitted here; part of the fingerprint.
        pictures: size, aspect, bucket_step and mode of query pictures, used by the configuration
            group ``queries``; ignored here.

    Attributes:
        ids: ids of all examples.
        summary: summary of each folder.

    Raises:
        DminError: there are no datasets.
    """

    def __init__(
        self, datasets: Mapping[str, Dataset], approximated: Sequence[str] = (), **pictures: Any
    ) -> None:
        if not datasets:
            raise DminError("data.datasets is empty: give one or more.")
        self.datasets: dict[str, Dataset] = dict(datasets)
        self.approximated: list[str] = list(approximated)
        self._ends = list(accumulate(len(each) for each in self.datasets.values()))
        self.ids: list[str] = [
            f"{name}/{id}" for name, each in self.datasets.items() for id in ids_of(each)
        ]
        told = {name: getattr(each, "summary", "") for name, each in self.datasets.items()}
        self.summary: str = "\n".join(f"{name}: {line}" for name, line in told.items() if line)

    def __len__(self) -> int:
        """Return the number of examples."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        """Return one example."""
        name, at = self._place(index)
        example = self.datasets[name][at]
        return replace(example, id=f"{name}/{example.id}")

    def facts(self, index: int) -> Facts:
        """Return what is known about an example besides its pixels."""
        name, at = self._place(index)
        return facts_at(self.datasets[name], at)

    def shape(self, index: int) -> Any:
        """Return the width and height of an example's tensor, if its dataset knows them."""
        name, at = self._place(index)
        known = getattr(self.datasets[name], "shape", None)
        return known(at) if callable(known) else None

    def _place(self, index: int) -> tuple[str, int]:
        """Return the name of an example's dataset, and its position in it."""
        number = bisect_right(self._ends, index)
        return list(self.datasets)[number], index - (self._ends[number - 1] if number else 0)

    def describe(self) -> dict[str, Any]:
        """Return the description of each dataset, and ``approximated``."""
        parts = {name: describe_dataset(each) for name, each in self.datasets.items()}
        told = {"approximated": self.approximated} if self.approximated else {}
        return {"name": "Together", "examples": len(self), "parts": parts, **told}
