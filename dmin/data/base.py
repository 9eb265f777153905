"""The interface of a dataset: examples with ids that never change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dmin.runtime.errors import DminError
from dmin.runtime.escape import named_apart
from dmin.runtime.fingerprint import array_digest

SCHEMA = 2
"""Version of descriptions: 2 covers what gradients depend on; 1, unnumbered, all metadata too."""


class Sizes(NamedTuple):
    """Original size and crop position of an image: conditions of SDXL and similar models."""

    original: tuple[int, int]  # height and width before scaling
    crop: tuple[int, int]  # top and left of the crop, in the scaled image


class Facts(NamedTuple):
    """What is known about an image besides its pixels; see :class:`Example`."""

    label: int | str | None = None
    caption: str | None = None
    metadata: Mapping[str, Any] | None = None
    repeats: float = 1

    def describe(self) -> dict[str, Any]:
        """Return them as a store keeps them.

        ``label``, ``caption`` and ``repeats`` are reserved for the values used in training. Other
        metadata columns of these names are renamed to ``metadata_label`` and so on, even if the
        example has no such value.
        """
        passes = None if self.repeats == 1 else self.repeats
        known = {"label": self.label, "caption": self.caption, "repeats": passes}
        rest = self.metadata or {}
        names = named_apart(rest, known)
        known = {name: value for name, value in known.items() if value is not None}
        return {**known, **{names[name]: value for name, value in rest.items()}}


@dataclass(frozen=True)
class Example:
    """One image and what is known about it.

    Args:
        id: unique in the dataset; independent of shuffling, batching and processes.
        image: float32 ``[C, H, W]`` in [0, 1]; a clip is ``[C, F, H, W]``, F ≥ 2.
        label: the class, if any.
        caption: the text, if any.
        metadata: other values to show with the results, as JSON.
        sizes: original size and crop; None if the image was neither scaled nor cropped.
        mask: float32 ``[1, H, W]``, the weight of each pixel in the loss; None for equal weights.
        condition_image: float32 ``[C', H', W']`` in [0, 1], an image that the model receives as
            condition: an image to edit, a mask, a drawing, a depth map.
        repeats: number of times that an epoch of the training used it.
        drawn: the example in each draw of the data's random augmentation; empty without any.
    """

    id: str
    image: Tensor
    label: int | str | None = None
    caption: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sizes | None = None
    mask: Tensor | None = None
    condition_image: Tensor | None = None
    repeats: float = 1
    drawn: Sequence[Example] = ()

    def describe(self) -> dict[str, Any]:
        """Return what a store keeps about the example besides its gradient."""
        return self.facts.describe()

    @property
    def facts(self) -> Facts:
        """What is known about it besides its pixels."""
        return Facts(self.label, self.caption, self.metadata, self.repeats)


class Dataset(Protocol):
    """Anything with a length whose items are :class:`Example`."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def __getitem__(self, index: int) -> Example:
        """Return one example."""


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Join examples into the batch that ``DiffusionModel.encode`` takes.

    Raises:
        DminError: an image is not a finite tensor as in :class:`Example`, or shapes differ.
    """
    first = examples[0]
    for example in examples:
        check_image(example)
        if example.image.shape != first.image.shape:
            raise DminError(
                f"image {example.id!r} is {tuple(example.image.shape)}, but {first.id!r} is "
                f"{tuple(first.image.shape)} [C, H, W]. Make all images the same size and mode: "
                f"for files set data.size=<pixels> data.aspect=square data.mode=RGB (for clips "
                f"also data.frames)."
            )
    return {
        "id": [e.id for e in examples],
        "image": torch.stack([e.image for e in examples]),
        "label": [e.label for e in examples],
        "caption": [e.caption for e in examples],
        "metadata": [e.describe() for e in examples],
        "sizes": [e.sizes for e in examples],
        **_masks(examples),
        **_condition_images(examples),
        **_drawn(examples),
    }


def _drawn(examples: Sequence[Example]) -> dict[str, Any]:
    """Return one batch per draw; examples without draws are used as they are in each."""
    number = max(len(e.drawn) for e in examples)
    each = [e.drawn or [e] * number for e in examples]
    return {"drawn": [collate([e[n] for e in each]) for n in range(number)]} if number else {}


def _masks(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return the masks of a batch if any example has one; others get ones."""
    if all(e.mask is None for e in examples):
        return {}
    ones = torch.ones(1, *examples[0].image.shape[1:])
    return {"mask": torch.stack([ones if e.mask is None else e.mask for e in examples])}


def _condition_images(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return the condition images of a batch; either all of its examples have one or none."""
    found = [e.condition_image for e in examples if e.condition_image is not None]
    if not found:
        return {}
    if len(found) < len(examples) or len({image.shape for image in found}) > 1:
        shapes = {e.id: tuple(getattr(e.condition_image, "shape", ())) for e in examples}
        raise DminError(f"all examples need a condition image of the same shape: {shapes}.")
    return {"condition_image": torch.stack(found)}


def by_shape(examples: Sequence[Example]) -> list[list[int]]:
    """Return the positions of the examples, grouped by the shapes of their images."""
    groups: dict[Any, list[int]] = {}
    for position, example in enumerate(examples):
        shown = (example.image, example.condition_image)
        shapes = tuple(tuple(getattr(image, "shape", ())) for image in shown)
        groups.setdefault(shapes, []).append(position)
    return list(groups.values())


def check_image(example: Example) -> None:
    """Refuse an image that would silently give a wrong gradient."""
    if example.condition_image is not None:
        check_image(Example(f"condition image of {example.id}", example.condition_image))
    image = example.image
    if not isinstance(image, Tensor) or image.dtype != torch.float32 or image.ndim not in (3, 4):
        found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image)
        raise DminError(
            f"image {example.id!r} is {found}; expected float32 [C, H, W], or [C, F, H, W] for a "
            f"clip, with values in [0, 1]."
        )
    if not torch.isfinite(image).all():
        raise DminError(
            f"image {example.id!r} has NaN or infinite pixels. Fix it or leave it out of the data."
        )
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        raise DminError(
            f"image {example.id!r} has values from {low:.3g} to {high:.3g}; expected [0, 1]. "
            f"Scale the dataset to [0, 1]; models convert to their own range."
        )


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """Return what identifies a dataset's content, as JSON, for the dataset fingerprint.

    If the dataset has a method ``describe()`` (of file digests, for instance), its result is used.
    Otherwise every example is read once, and what gradients depend on is digested: id, pixels,
    mask, condition image, sizes, label and caption. Other metadata may change. Ids must be unique
    in either case; a dataset with a list ``ids`` need not read its examples to check this.

    Raises:
        DminError: there are no examples, an id is not text, or two examples have the same id.
    """
    name = type(dataset).__name__
    if len(dataset) == 0:
        raise DminError(f"the dataset {name} is empty: nothing to collect.")
    describe = getattr(dataset, "describe", None)
    if describe is not None:
        ids = getattr(dataset, "ids", None)
        _check_ids(ids if ids is not None else (e.id for e in _examples(dataset)))
        return dict(describe())
    return {"schema": SCHEMA, **_digested(dataset, lambda e: [e.id, e.label, e.caption])}


def describe_fully(
    dataset: Dataset, kept: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Return what identified a dataset's content before `SCHEMA` 2, which included all metadata.

    Args:
        dataset: the examples.
        kept: metadata by id, as a store keeps them, used instead of those of the examples.
    """
    own = getattr(dataset, "describe_fully", None)
    if own is not None:
        return dict(own(kept))
    if hasattr(dataset, "describe"):
        return dict(dataset.describe())

    def facts(e: Example) -> list[Any]:
        known = {"label": e.label, "caption": e.caption}
        metadata = {**{k: v for k, v in known.items() if v is not None}, **e.metadata}
        return [e.id, e.label, e.caption, (kept or {}).get(e.id, metadata)]

    return _digested(dataset, facts)


def _digested(dataset: Dataset, facts: Callable[[Example], list[Any]]) -> dict[str, Any]:
    """Describe a dataset by a digest of its examples' pixels and of ``facts`` of each."""
    content = hashlib.sha256()

    def digest() -> Iterator[str]:
        for example in _examples(dataset):
            sizes = [] if example.sizes is None else [list(example.sizes)]
            text = json.dumps([*facts(example), *sizes], sort_keys=True, default=repr)
            arrays = [each.numpy() for each in (example.image, example.mask) if each is not None]
            content.update(f"{array_digest(*arrays)}{text}".encode())
            if example.condition_image is not None:
                content.update(f"+{array_digest(example.condition_image.numpy())}".encode())
            yield example.id

    _check_ids(digest())
    return {
        "name": type(dataset).__name__,
        "examples": len(dataset),
        "content": content.hexdigest()[:16],
    }


def _examples(dataset: Dataset) -> Iterator[Example]:
    return (dataset[index] for index in range(len(dataset)))


def _check_ids(ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for found in ids:
        if not isinstance(found, str):
            raise DminError(f"an example has the id {found!r}; ids are text, such as '{found}'.")
        if found in seen:
            raise DminError(f"two examples have the id {found!r}; ids must be unique in a dataset.")
        seen.add(found)


class Examples:
    """A dataset of examples in memory.

    Args:
        examples: the examples, in order.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples: list[Example] = list(examples)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        """Return one example."""
        return self.examples[index]

    def facts(self, index: int) -> Facts:
        """Return what is known about an example besides its pixels."""
        return self.examples[index].facts
