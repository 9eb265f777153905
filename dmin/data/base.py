"""What dmin asks of a dataset: examples with ids that never change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dmin.errors import DminError
from dmin.fingerprint import array_digest


@dataclass(frozen=True)
class Example:
    """One image and what is known of it.

    Args:
        id: never changes with shuffling, batching or processes; unique in its dataset.
        image: float32 ``[C, H, W]`` in [0, 1].
        label: class, if any.
        caption: text, if any.
        metadata: anything else that should travel to the results, as JSON.
    """

    id: str
    image: Tensor
    label: int | str | None = None
    caption: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

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
    for example in examples:
        check_image(example)
    return {
        "id": [e.id for e in examples],
        "image": torch.stack([e.image for e in examples]),
        "label": [e.label for e in examples],
        "caption": [e.caption for e in examples],
        "metadata": [e.describe() for e in examples],
    }


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

    A dataset with a ``describe()`` of its own (say, file sizes and digests) is asked; otherwise
    every example is read once and its id, image, label and caption are digested.

    Raises:
        DminError: no examples, or two with the same id.
    """
    if len(dataset) == 0:
        raise DminError(f"the dataset {type(dataset).__name__} is empty: nothing to collect.")
    describe = getattr(dataset, "describe", None)
    if describe is not None:
        return dict(describe())
    examples = [dataset[index] for index in range(len(dataset))]
    ids = [example.id for example in examples]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise DminError(f"two examples have the id {twice!r}; ids must be unique in a dataset.")
    digests = "".join(array_digest(e.image.numpy()) for e in examples)
    facts = repr([(e.id, e.label, e.caption) for e in examples])
    content = torch.frombuffer(bytearray((digests + facts).encode()), dtype=torch.uint8)
    return {
        "name": type(dataset).__name__,
        "examples": len(examples),
        "content": array_digest(content.numpy()),
    }


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
