"""A folder of images, with captions and labels beside them."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal  # noqa: F401 (Literal: see the annotations of Pixels)

from PIL import Image
from torch import Tensor

from dmin.data.base import Example, Facts
from dmin.data.captions import Captions, Draws
from dmin.data.checked import NO_TEXT, Checked, describe_problems, printable, require_same
from dmin.data.formats import suffixes
from dmin.data.layout import PLAIN, Folder
from dmin.data.masks import NO_PARTNER, partners, unlike, with_partner
from dmin.data.survey import Survey, read_bytes, survey
from dmin.runtime.errors import DminError


@dataclass(eq=False)
class ImageFolder(Checked):
    """The images of a folder, ordered by name; an image's id is its path below the folder.

    Captions and labels come from ``metadata.jsonl``, ``.csv`` or ``.parquet``, in the folder or in
    subfolders, with a column ``file_name`` (as in Hugging Face's imagefolder). Further columns
    become metadata. The dataset then consists of the images named there. Without such a file,
    captions are in files next to the images (``.txt``, ``.caption``, or ``.json`` of img2dataset,
    whose fields become metadata) or in kohya's ``metadata.json``, and the name of the subfolder is
    the label. A name such as ``10_name`` of kohya's folders gives repeats, and the caption of
    images without one. Links are followed. Hidden files and folders (``.name``, ``__name__``) and
    masks (``a-masklabel.png``, or ``masks/a.png`` if there is an image ``a``) are not examples.

    Args:
        root: the folder.
        layout: where captions and labels are, one of `dmin.data.layout.LAYOUTS`. ``auto`` detects
            it, and refuses a folder that is ambiguous.
        label: column of the label, or several, of which the first that exists is used; None for no
            labels.
        text: the same for the caption; None for no captions.
        condition_image: the model's condition images, read like the images: a folder with files of
            the same names, one image for all, or a metadata column with file names; None for none.
        draws: random augmentation in training; None for none.

    Attributes:
        ids: paths of the images below the folder, in order.
        summary: the detected layout and the ignored files, on one line.

    Raises:
        DminError: there is no such folder, it has no images, or metadata or images are invalid.
    """

    root: str | Path
    _: KW_ONLY
    label: str | Sequence[str | None] | None = "label"
    text: str | Sequence[str | None] | None = "text"
    layout: str = "auto"
    condition_image: str | Path | None = None
    draws: Draws | None = None

    noun: ClassVar[str] = "images"

    def __post_init__(self) -> None:
        """Find the images with their captions and labels."""
        super().__post_init__()
        if not Path(self.root).is_dir():
            raise DminError(f"data.root={self.root}: no such folder. Give a folder of images.")
        self._wrong: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self._sizes: dict[str, Any] = {}  # height and width of each surveyed image
        self.summary: str = ""
        self._files: Folder | None = None
        facts = self._find()
        self._partners: dict[str, str] = {}
        if self.condition_image is not None and facts:
            shown = self.condition_image, facts, self.opened_suffixes
            self._partners = partners(Path(self.root), *shown)
        if not facts:
            self.leave_out(self._wrong, len(self._wrong), f"data.root={self.root}")
            raise DminError(
                f"data.root={self.root} holds no {self.noun} ({', '.join(self.opened_suffixes)}). "
                f"Give another folder. {self._files.summary({}) if self._files else ''}"
            )
        problems = self.lacking({name: known.caption for name, known in facts.items()})
        own = self._problems(sorted(facts))
        problems |= self._problems_beside(facts) | own | self._wrong
        self.leave_out(problems, len(facts.keys() | problems), f"data.root={self.root}")
        self.ids: list[str] = sorted(facts.keys() - self.skipped.keys())
        self._facts = [facts[name] for name in self.ids]
        if self._files is not None:
            self.summary = self._files.summary(dict(zip(self.ids, self._facts, strict=True)))
        del self._files  # its lists of files are not needed in other processes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        """Return one example, with its draws."""
        found = self._example(index)
        if self.draws is None:
            return found
        return replace(found, drawn=[self._drawn(index, n) for n in range(self.draws.number)])

    def _drawn(self, index: int, draw: int) -> Example:
        assert self.draws is not None
        rng, seen = self.draws.of(self.ids[index], draw), copy.copy(self)
        seen.at, seen.mirrored = self.draws.view(rng)
        found = seen._example(index)
        if found.caption is None:
            return found
        return replace(found, caption=self._worded(found, self.draws, rng))

    def _worded(self, example: Example, draws: Draws, rng: Any) -> str:
        """Return an example's caption with random augmentation."""
        return Captions().worded([example.caption or ""], draws, rng)

    def _example(self, index: int) -> Example:
        name, facts = self.ids[index], self._facts[index]
        path = Path(self.root) / name
        content = self.content(path, str(path))
        require_same(name, content, self.sums.get(name, ""))
        image, sizes = self.decode(content, str(path))
        told = facts.label, facts.caption, facts.metadata or {}
        found = Example(name, image, *told, sizes, repeats=facts.repeats)
        if self.condition_image is None:
            return found
        partner = self._partners[name]
        content = read_bytes(Path(self.root) / partner, partner)
        require_same(partner, content, self.sums.get(partner, ""))
        return with_partner(found, self.decode(content, partner))

    def content(self, path: Path, name: str) -> bytes:
        """Return the bytes that an example is decoded from; ``name`` is for messages."""
        return read_bytes(path, name)

    def is_example(self, path: Path) -> bool:
        """Return whether a path may be an example."""
        return os.path.isfile(path)  # raises no error for invalid names

    @property
    def opened_suffixes(self) -> tuple[str, ...]:
        """Suffixes of the files that can be opened."""
        return suffixes()

    def facts(self, index: int) -> Facts:
        """Return what is known about an image besides its pixels."""
        return self._facts[index]

    def shape(self, index: int) -> tuple[int, int] | None:
        """Return the width and height of an image's tensor, if it was surveyed."""
        height, width = self._sizes.get(self.ids[index]) or (0, 0)
        return self._size_of((width, height)) if width else None

    def file(self, index: int) -> Path:
        """Return the path of an image."""
        return Path(self.root) / self.ids[index]

    def describe(self) -> dict[str, Any]:
        """Return settings, and a digest of the name, bytes, label and caption of every image."""
        content = self._content([facts[:2] for facts in self._facts])
        drawn = {} if self.draws is None else {"draws": asdict(self.draws)}
        return self.described(len(self), content=content, **drawn)

    def describe_fully(self, kept: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Return settings and a digest that includes all metadata; see `dmin.data.base`."""
        pairs = zip(self.ids, self._facts, strict=True)
        rows = [_as_kept(facts, kept[id]) if kept and id in kept else facts for id, facts in pairs]
        found = self.described(len(self), content=self._content(rows))
        del found["schema"]
        return found

    def file_digests(self) -> dict[str, str]:
        """Return a digest of the bytes of each image's file, by id, as of the latest reading."""
        return self._digests or self._survey(self.ids).found

    def _content(self, facts: Sequence[Sequence[Any]]) -> str:
        given = [self._partners[name] for name in self.ids if name in self._partners]
        digests, problems = self._survey([*self.ids, *given])
        self._digests = {name: digests[name] for name in self.ids if name in digests}
        if problems:  # new ones, or not checked at creation
            raise DminError(describe_problems(problems, len(self), f"data.root={self.root}"))
        others = [[digests[each]] for each in given] or [[]] * len(self.ids)
        told = zip(self.ids, facts, others, strict=True)
        rows = [[name, digests[name], *known, *other] for name, known, other in told]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]

    def _find(self) -> dict[str, Facts]:
        """Return what is known about each image."""
        self._files = self._files_of(Path(self.root))
        return self._files.read(self.layout, self.label, self.text, self.told_wrong)

    def _files_of(self, root: Path) -> Folder:
        plain = self.layout == "plain"
        named = PLAIN if plain else None, True, () if plain else None, self.condition_image
        return Folder(root, *named)

    def told_wrong(self, name: str, error: DminError) -> None:
        """Leave out an image with unusable caption or metadata, or raise the error.

        Args:
            name: name of the image, or of the line that describes it.
            error: the problem.
        """
        if self.on_error == "raise":
            raise error
        self._wrong[name] = getattr(error, "reason", str(error)).rstrip(".")

    def _problems(self, names: list[str]) -> dict[str, str]:
        """Return the images that cannot be used, with reasons; read them only with ``check``."""
        if self.check:
            problems = self._survey(names).problems
        else:
            absent = [name for name in names if not self.is_example(Path(self.root) / name)]
            problems = dict.fromkeys(absent, "there is no such file")
        for name in names:
            if printable(name) != name:
                problems[name] = NO_TEXT
        return problems

    def _problems_beside(self, names: Iterable[str]) -> dict[str, str]:
        """Return the images without a usable condition image, with reasons, if one is needed."""
        if self.condition_image is None:
            return {}
        found = self._problems(sorted(set(self._partners.values())))
        lacking = {name: NO_PARTNER for name in names if name not in self._partners}
        for name, partner in self._partners.items():
            if partner in found:
                lacking[name] = f"its condition image: {found[partner]}"
            elif reason := unlike(self._sizes.get(name), self._sizes.get(partner)):
                lacking[name] = reason
        return lacking

    def _survey(self, names: list[str]) -> Survey:
        settings = {**self.settings(), "max_pixels": self.max_pixels} if self.check else {}
        settings |= {"checked": self.check, "sized": True}
        found, problems = survey(Path(self.root), names, self._look, settings)
        self._sizes |= {name: size for name, (_, size) in found.items()}
        digests = {name: digest for name, (digest, _) in found.items()}
        self.sums |= digests
        return Survey(digests, problems)

    def _look(self, path: Path, name: str) -> tuple[str, Any]:
        """Return digest and size of an image; with ``check``, refuse it if it is not decodable."""
        content = self.content(path, name)
        size = self.probe(content, name) if self.check else None
        return hashlib.sha256(content).hexdigest(), size


def _as_kept(facts: Facts, kept: Mapping[str, Any]) -> Facts:
    """Return facts with the metadata that a store keeps, instead of their own."""
    given = {"label": facts.label, "caption": facts.caption, "repeats": facts.repeats}
    rest = {k: v for k, v in kept.items() if v is None or given.get(k) != v}
    return facts._replace(metadata=rest if rest or facts.metadata is not None else None)


def save_images(
    folder: str | Path,
    images: Tensor,
    names: list[str],
    rows: list[dict[str, Any]],
    append: bool = False,
) -> None:
    """Write images and ``metadata.jsonl`` so that :class:`ImageFolder` reads them back.

    Args:
        folder: the folder; it is created if it does not exist.
        images: ``[n, C, H, W]`` in [0, 1], written as 8-bit PNG; or clips ``[n, C, F, H, W]``,
            written as lossless WebP.
        names: file names, ending in ``.png`` or ``.webp``.
        rows: metadata of each image.
        append: append to existing metadata instead of replacing them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for image, name in zip(images, names, strict=True):
        pixels = (image * 255).round().byte().movedim(0, -1).squeeze(-1).numpy()
        if image.ndim == 3:
            Image.fromarray(pixels).save(folder / name)
            continue
        first, *others = map(Image.fromarray, pixels)
        first.save(folder / name, save_all=True, append_images=others, lossless=True, duration=62)
    lines = [json.dumps({"file_name": name, **row}) for name, row in zip(names, rows, strict=True)]
    with (folder / "metadata.jsonl").open("a" if append else "w") as file:
        file.write("\n".join(lines) + "\n")
