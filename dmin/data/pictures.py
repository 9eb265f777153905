"""Query pictures from files: one, several, or a folder of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dmin.data.base import Example, Facts
from dmin.data.captions import Captions
from dmin.data.image_folder import ImageFolder
from dmin.data.metadata import NAMES, read_facts, read_rows
from dmin.data.part import Part
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import array_digest

Prompt = str | int


@dataclass(eq=False)
class Pictures(ImageFolder):
    """Query pictures: a folder as in :class:`ImageFolder`, or single files in the given order.

    Captions and labels of a file come from metadata files next to it, else from its ``.txt``.

    Args:
        root: a folder, a picture, or several pictures.
        prompt: caption or class (a number or a name) of all pictures, or one for each picture in
            ``root``; replaces the metadata's.
        region: the part of each picture to attribute, see :class:`~dmin.data.part.Part`.
        mask: the same, from files.
        pool: combine all pictures to one query by the ``mean`` or ``max`` of their scores.
        against: pictures whose pooled scores are subtracted, see `others`.

    Raises:
        DminError: as :class:`ImageFolder`; or the numbers of prompts and pictures differ.
    """

    root: str | Path | Sequence[str | Path]  # type: ignore[assignment]
    _: KW_ONLY
    prompt: Prompt | Sequence[Prompt] | None = None
    region: Sequence[float] | None = None
    mask: str | Path | None = None
    pool: Literal["mean", "max"] | None = None
    against: str | Path | None = None

    def __post_init__(self) -> None:
        """Find the pictures with their captions and labels."""
        self._named: list[str] | None = None
        roots = [self.root] if isinstance(self.root, str | Path) else list(self.root)
        files = [Path(each).expanduser() for each in roots]
        whole = len(files) == 1 and files[0].is_dir() and not self.is_example(files[0])
        self.root = files[0] if whole else self._folder(files)
        asked = self.region is not None or self.mask is not None
        self.part: Part | None = Part(self.region, self.mask) if asked else None
        super().__post_init__()
        for name in self.ids if self.part is not None else ():
            self._part_of(name)  # raises errors now

    def __getitem__(self, index: int) -> Example:
        """Return one example, with the mask of the part to attribute."""
        example = super().__getitem__(index)
        return example if self.part is None else replace(example, mask=self._part_of(example.id))

    def _part_of(self, name: str) -> Tensor:
        assert self.part is not None
        return self.part.of(Path(str(self.root)), name, self)

    def described(self, examples: int, **content: Any) -> dict[str, Any]:
        """Return the description of an :class:`ImageFolder`, so that equal pictures match."""
        found = {**super().described(examples, **content), "name": ImageFolder.__name__}
        if self.part is not None:
            masks = [self._part_of(name).numpy() for name in self.ids]
            found["part"] = array_digest(*masks)
        return found

    @cached_property
    def others(self) -> Pictures | None:
        """The whole pictures of ``against``; it is an error if one is also in ``root``."""
        if self.against is None:
            return None
        more = ["prompt"] * isinstance(self.prompt, list | tuple)  # prompts are for single pictures
        left: dict[str, Any] = dict.fromkeys(["region", "mask", "against", *more])
        try:
            found = replace(self, root=self.against, **left)
        except DminError as error:
            raise DminError(str(error).replace("data.root=", "queries.against=")) from error
        mine = set(self.file_digests().values())
        if twice := [id for id, digest in found.file_digests().items() if digest in mine]:
            told = f"{twice[0]} is also a query, and would cancel itself. Leave it out."
            raise DminError(f"queries.against={self.against}: {told}")
        return found

    def _folder(self, files: list[Path]) -> Path:
        """Return the folder that the pictures share, and name them by their paths below it."""
        absent = [file for file in files if not self.is_example(file)]
        if absent or not files:
            odd = absent[0] if absent else "[]"
            raise DminError(
                f"data.root={odd}: this file does not exist. Give picture files, or one folder."
            )
        folder = Path(os.path.commonpath([file.absolute().parent for file in files]))
        self._named = [file.absolute().relative_to(folder).as_posix() for file in files]
        if len(set(self._named)) < len(files):
            raise DminError(f"data.root={[str(f) for f in files]}: one of them is given twice.")
        return folder

    def _find(self) -> dict[str, Facts]:
        if self._named is None:
            facts = super()._find()
        else:
            facts = dict.fromkeys(self._named, Facts()) | self._read_facts()
        prompts = self.prompt if isinstance(self.prompt, list | tuple) else None
        if prompts is None:
            return {name: self._asked(fact, self.prompt) for name, fact in facts.items()}
        if self._named is None or len(prompts) != len(facts):
            raise DminError(
                f"data.prompt has {len(prompts)} prompts, and there are {len(facts)} pictures: "
                f"give one for all, or one for each picture in data.root."
            )
        asked = zip(self._named, prompts, strict=True)
        return {name: self._asked(facts[name], prompt) for name, prompt in asked}

    def _read_facts(self) -> dict[str, Facts]:
        """Return captions, labels and metadata from files next to the pictures."""
        root = Path(self.root)  # type: ignore[arg-type]
        folders = dict.fromkeys(Path(name).parent for name in self._named or ())
        files = [(folder / name).as_posix() for folder in folders for name in NAMES]
        rows = read_rows(root, [file for file in files if (root / file).is_file()])
        named = {name: rows[name] for name in self._named or () if name in rows}
        facts = read_facts(named, f"the metadata in {root}", self.label, self.text) if named else {}
        others = [name for name in self._named or () if name not in facts]
        beside = [path.relative_to(root) for f in folders for path in (root / f).iterdir()]
        captions = Captions(extensions=(".txt", ".caption"), missing="drop")
        told = captions.read(root, others, [path.as_posix() for path in beside])
        return {**{name: Facts(caption=caption) for name, caption in told.items()}, **facts}

    def _asked(self, facts: Facts, prompt: Any) -> Facts:
        if self.part is not None:
            facts = facts._replace(metadata={**(facts.metadata or {}), "part": self.part.spell()})
        if prompt is None:
            return facts
        if isinstance(prompt, int):
            return facts._replace(label=prompt)
        # The prompt may be the name of a class, which replaces the name in the metadata.
        label = None if isinstance(facts.label, str) else facts.label
        return facts._replace(caption=prompt, label=label)
