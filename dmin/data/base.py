"""What dmin asks of a dataset: examples with ids that never change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import array_digest


class Sizes(NamedTuple):
    """How an image came to its size: what SDXL and its kin are told of it."""

    original: tuple[int, int]  # height and width before it was scaled
    crop: tuple[int, int]  # top and left of the cut, in the scaled image


@dataclass(frozen=True)
class Example:
    """One image and what is known of it.

    Args:
        id: never changes with shuffling, batching or processes; unique in its dataset.
        image: float32 ``[C, H, W]`` in [0, 1].
        label: class, if any.
        caption: text, if any.
        metadata: anything else that should travel to the results, as JSON.
        sizes: how the image came to its size; None if it is as it was.
    """

    id: str
    image: Tensor
    label: int | str | None = None
    caption: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sizes | None = None

    def describe(self) -> dict[str, Any]:
        """Return what a store keeps of the example beside its gradient."""
        known = {"label": self.label, "caption": self.caption}
        return {**{k: v for k, v in known.items() if v is not None}, **self.metadata}


class Dataset(Protocol):
    """Anything with a length whose items are :class:`Example`."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def __getitem__(self, index: int) -> Example:
        """Return one example."""


def collate(examples: Sequence[Example]) -> dict[str, Any]:
    """Join examples into the batch that ``DiffusionModel.encode`` takes.

    Raises:
        DminError: an image is not a finite ``[C, H, W]`` tensor in [0, 1], or shapes differ.
    """
    first = examples[0]
    for example in examples:
        check_image(example)
        if example.image.shape != first.image.shape:
            raise DminError(
                f"image {example.id!r} is {tuple(example.image.shape)}, but {first.id!r} is "
                f"{tuple(first.image.shape)} [C, H, W]. Bring all to one size and mode, with files "
                f"by data.size=<pixels> data.aspect=square data.mode=RGB."
            )
    return {
        "id": [e.id for e in examples],
        "image": torch.stack([e.image for e in examples]),
        "label": [e.label for e in examples],
        "caption": [e.caption for e in examples],
        "metadata": [e.describe() for e in examples],
        "sizes": [e.sizes for e in examples],
    }


def by_shape(examples: Sequence[Example]) -> list[list[int]]:
    """Return the positions of examples whose images have one shape, shape by shape."""
    groups: dict[Any, list[int]] = {}
    for position, example in enumerate(examples):
        groups.setdefault(tuple(getattr(example.image, "shape", ())), []).append(position)
    return list(groups.values())


def check_image(example: Example) -> None:
    """Refuse an image that would poison a gradient without a word."""
    image = example.image
    if not isinstance(image, Tensor) or image.dtype != torch.float32 or image.ndim != 3:
        found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image)
        raise DminError(f"image {example.id!r} is {found}; expected float32 [C, H, W] in [0, 1].")
    if not torch.isfinite(image).all():
        raise DminError(
            f"image {example.id!r} has NaN or infinite pixels. Mend it or leave it out of the data."
        )
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        raise DminError(
            f"image {example.id!r} has values from {low:.3g} to {high:.3g}; expected [0, 1]. "
            f"Scale the dataset; models map to their own range themselves."
        )


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """Return what identifies a dataset's content, as JSON: its dataset fingerprint is made of it.

    A dataset with a ``describe()`` of its own (say, of file digests) is asked; otherwise every
    example is read once, one at a time, and all that is known of it is digested. Ids are held to
    be unique either way; a dataset that offers them as a list, ``ids``, saves reading its examples
    for that.

    Raises:
        DminError: no examples, an id that is no text, or two with the same id.
    """
    name = type(dataset).__name__
    if len(dataset) == 0:
        raise DminError(f"the dataset {name} is empty: nothing to collect.")
    describe = getattr(dataset, "describe", None)
    if describe is not None:
        ids = getattr(dataset, "ids", None)
        _check_ids(ids if ids is not None else (e.id for e in _examples(dataset)))
        return dict(describe())
    content = hashlib.sha256()

    def digest() -> Iterator[str]:
        for example in _examples(dataset):
            facts: list[Any] = [example.id, example.label, example.caption, example.describe()]
            if example.sizes is not None:
                facts.append(list(example.sizes))
            text = json.dumps(facts, sort_keys=True, default=repr)
            content.update(f"{array_digest(example.image.numpy())}{text}".encode())
            yield example.id

    _check_ids(digest())
    return {"name": name, "examples": len(dataset), "content": content.hexdigest()[:16]}


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
        self.examples = list(examples)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        """Return one example."""
        return self.examples[index]
