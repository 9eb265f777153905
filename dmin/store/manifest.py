"""What a store holds: the axes of its features, and the settings that must not change."""

import json
import re
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from dmin.errors import DminError
from dmin.fingerprint import fingerprint
from dmin.store.encoding import STORED_AS

FORMAT, SCHEMA = "dmin-store", 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Layout:
    """The axes of every feature array, ``[rows, draw, timestep, group, dim]``, one per readout.

    Args:
        readouts: what was differentiated, such as ``("loss",)``; names an HDF5 dataset.
        draws: noises drawn for each timestep.
        timesteps: the timesteps, in the order of their axis.
        groups: parameters sketched together, such as ``("model",)``.
        dim: entries of one sketch.
        dtype: how features are stored, one of ``STORED_AS``; they are read as float32.

    Raises:
        DminError: a value is not allowed.
    """

    readouts: tuple[str, ...]
    draws: int
    timesteps: tuple[float, ...]
    groups: tuple[str, ...]
    dim: int
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Turn sequences (JSON and Hydra have no tuples) into tuples, and check every value."""
        for name, kind in (("readouts", str), ("timesteps", float), ("groups", str)):
            values = tuple(kind(value) for value in getattr(self, name))
            object.__setattr__(self, name, values)
            if not values or len(set(values)) < len(values):
                raise DminError(f"layout.{name} is {list(values)}: give one or more, all different")
        for readout in self.readouts:
            if not re.fullmatch(r"\w[\w.-]*", readout):
                raise DminError(
                    f"layout.readouts: {readout!r} has a character other than a-z0-9_.-"
                )
        for name in ("draws", "dim"):
            require_count(f"layout.{name}", getattr(self, name))
        if self.dtype not in STORED_AS:
            allowed = " or ".join(STORED_AS)
            raise DminError(f"layout.dtype is {self.dtype!r}, which is not offered: use {allowed}")

    @property
    def row_shape(self) -> tuple[int, int, int, int]:
        """The shape of one row's features, ``(draws, timesteps, groups, dim)``."""
        return self.draws, len(self.timesteps), len(self.groups), self.dim

    @property
    def row_bytes(self) -> int:
        """What the features of one row and readout take in the file."""
        return prod(self.row_shape) * STORED_AS[self.dtype].itemsize


@dataclass(frozen=True)
class Manifest:
    """What a store holds: deterministic, without times and host names.

    Args:
        layout: axes of the features.
        features: JSON; everything that must match between a training and a query store (weights,
            loss, noise, schedule, sketch ...).
        dataset: JSON; everything that must not change between starting and resuming (name, content
            digest ...).
        num_examples: examples of the dataset.
        block_size: examples of one block; the last block may be shorter.

    Raises:
        DminError: a value is not JSON, or a count is not positive.
    """

    layout: Layout
    features: dict[str, Any]
    dataset: dict[str, Any]
    num_examples: int
    block_size: int

    def __post_init__(self) -> None:
        """Check counts, and keep the two mappings as a reader will find them."""
        for name in ("num_examples", "block_size"):
            require_count(name, getattr(self, name))
        for name in ("features", "dataset"):
            try:
                plain = json.loads(json.dumps(getattr(self, name), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise DminError(
                    f"The manifest's {name} cannot be written as JSON ({error}): use only mappings,"
                    " lists, texts, finite numbers, booleans and null."
                ) from error
            object.__setattr__(self, name, plain)

    @property
    def feature_fingerprint(self) -> str:
        """Equal for stores whose rows may be multiplied with each other, whatever their dtype."""
        return fingerprint(self.comparable())

    @property
    def dataset_fingerprint(self) -> str:
        """Equal for stores of the same examples in the same order."""
        return fingerprint({**self.dataset, "num_examples": self.num_examples})

    @property
    def fingerprint(self) -> str:
        """Equal for stores whose segments are interchangeable; every segment carries it."""
        return fingerprint(self.document())

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the last and perhaps shorter one included."""
        return -(-self.num_examples // self.block_size)

    def block_rows(self, block: int) -> range:
        """Return the dataset positions of one block."""
        if not 0 <= block < self.num_blocks:
            raise DminError(
                f"block {block} does not exist: the store has {self.num_blocks}, from 0"
            )
        start = block * self.block_size
        return range(start, min(start + self.block_size, self.num_examples))

    def comparable(self) -> dict[str, Any]:
        """Return the fields that two stores must share to be compared."""
        layout = asdict(self.layout)
        del layout["dtype"]
        return {"features": self.features, "layout": layout}

    def document(self) -> dict[str, Any]:
        """Return the whole manifest as JSON values."""
        return {"format": FORMAT, "schema": SCHEMA, **asdict(self)}

    def to_json(self) -> str:
        """Return the text of ``manifest.json``."""
        return json.dumps(self.document(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = MANIFEST) -> "Manifest":
        """Read a manifest back.

        Args:
            text: what ``to_json`` returned.
            source: name of the file, for messages.

        Raises:
            DminError: not a manifest, damaged, or of a schema this version does not know.
        """
        try:
            document = json.loads(text)
            found = document.pop("format"), document.pop("schema")
            if found == (FORMAT, SCHEMA):
                return cls(**{**document, "layout": Layout(**document["layout"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DminError(
                f"{source} is damaged or not the manifest of a store ({error!r}): restore it from"
                " a copy, or collect into a new directory."
            ) from error
        raise DminError(
            f"{source} has format {found[0]!r}, schema {found[1]!r}; this dmin reads {FORMAT!r},"
            f" schema {SCHEMA}: use the version of dmin that wrote it, or collect again."
        )


def require_count(name: str, value: int) -> None:
    """Raise DminError unless the value is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DminError(f"{name} is {value!r}: give a whole number from 1 up.")
