"""The manifest of a store: the axes of its features, and the settings that must not change."""

import json
import re
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import prod
from tokenize import TokenError
from typing import Any

import numpy as np

from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import fingerprint
from dmin.store.encoding import STORED_AS, scale_shape

FORMAT, SCHEMA = "dmin-store", 1
MANIFEST = "manifest.json"
# What parsers raise on files that dmin did not write. RecursionError is a RuntimeError; NumPy
# parses the headers of its files as Python.
UNREADABLE = (
    *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError),
    *(RuntimeError, OverflowError, EOFError, SyntaxError, TokenError),
)


@dataclass(frozen=True)
class Layout:
    """The axes of every feature array, ``[rows, draw, timestep, group, dim]``, one per readout.

    Args:
        readouts: what was differentiated, such as ``("loss",)``; each names an HDF5 dataset.
            Empty: the store holds only losses.
        draws: noise draws per timestep.
        timesteps: the timesteps, in the order of their axis.
        groups: groups of parameters that are sketched together, such as ``("model",)``.
        dim: k, the dimensions of one sketch.
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
            few = not values and name != "readouts"  # no readouts: the store holds only losses
            if few or len(set(values)) < len(values):
                raise DminError(
                    f"layout.{name} is {list(values)}: give one or more different values"
                )
        if not np.isfinite(self.timesteps).all():
            raise DminError(f"layout.timesteps is {list(self.timesteps)}: give finite numbers")
        for readout in self.readouts:
            if not re.fullmatch(r"\w[\w.-]*", readout):
                raise DminError(
                    f"layout.readouts: {readout!r} has a character other than a-z0-9_.-"
                )
        for name in ("draws", "dim"):
            require_count(f"layout.{name}", getattr(self, name))
        if self.dtype not in STORED_AS:
            allowed = " or ".join(STORED_AS)
            raise DminError(f"collect.dtype={self.dtype!r} is not supported: use {allowed}.")

    @property
    def row_shape(self) -> tuple[int, int, int, int]:
        """The shape of one row's features, ``(draws, timesteps, groups, dim)``."""
        return self.draws, len(self.timesteps), len(self.groups), self.dim

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """The shape of a row's scales, draws and timesteps first; None if its dtype has none."""
        parts = scale_shape(len(self.groups) * self.dim, self.dtype)
        return None if parts is None else (*self.row_shape[:2], *parts)

    @property
    def steps(self) -> int:
        """Number of scalar factors of a row: one per scale, else one per draw and timestep."""
        return prod(self.scale_shape or self.row_shape[:2])

    @property
    def row_bytes(self) -> int:
        """Bytes of the features of one row and readout in the file."""
        return prod(self.row_shape) * STORED_AS[self.dtype].itemsize


@dataclass(frozen=True)
class Revision:
    """The state of a store before examples were appended.

    Args:
        dataset: ``Manifest.dataset`` at that time.
        num_examples: number of examples at that time; later rows were appended.
    """

    dataset: dict[str, Any]
    num_examples: int


@dataclass(frozen=True)
class Manifest:
    """What a store holds: deterministic, without times and host names.

    Args:
        layout: axes of the features.
        features: JSON; everything that must match between a training and a query store (weights,
            loss, noise, schedule, sketch ...).
        dataset: JSON; everything that must not change between starting and resuming (name, content
            digest ...).
        num_examples: number of rows of the complete store, one per example.
        block_size: examples per block; the last block of each revision may be shorter.
        revisions: earlier states, the oldest first. Appending does not change the positions of
            rows.

    Raises:
        DminError: a value is not JSON, or a count is not positive.
    """

    layout: Layout
    features: dict[str, Any]
    dataset: dict[str, Any]
    num_examples: int
    block_size: int
    revisions: tuple[Revision, ...] = ()

    def __post_init__(self) -> None:
        """Check counts, and convert the two mappings to what JSON reads back."""
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
        old = (each if isinstance(each, Revision) else Revision(**each) for each in self.revisions)
        object.__setattr__(self, "revisions", tuple(old))

    @property
    def feature_fingerprint(self) -> str:
        """Equal for stores with comparable features, whatever their dtype."""
        return fingerprint(self.comparable())

    @property
    def dataset_fingerprint(self) -> str:
        """Equal for stores of the same examples in the same order."""
        return fingerprint({**self.dataset, "num_examples": self.num_examples})

    @cached_property
    def fingerprint(self) -> str:
        """Equal for stores whose segments are interchangeable; every segment carries it."""
        return fingerprint(self.document())

    @property
    def encodings_key(self) -> str:
        """Equal for stores whose examples are encoded alike, block by block."""
        made_of = {
            "model": [self.features.get("loss"), self.features.get("encoders")],
            "dataset": self.dataset_fingerprint,
            "block_size": self.block_size,
        }
        return fingerprint(made_of)

    @property
    def states(self) -> "list[Manifest]":
        """The manifest as of each revision, the oldest first; the last is this one."""
        earlier = [
            replace(self, **asdict(each), revisions=self.revisions[:number])
            for number, each in enumerate(self.revisions)
        ]
        return [*earlier, self]

    @cached_property
    def fingerprints(self) -> frozenset[str]:
        """The fingerprints that its segments may have: its own and those of earlier revisions."""
        return frozenset(each.fingerprint for each in self.states)

    @cached_property
    def _cuts(self) -> tuple[np.ndarray, np.ndarray]:
        """First row and first block of each revision, and the ends; ``[revisions + 2]`` each."""
        rows = [0, *(each.num_examples for each in self.revisions), self.num_examples]
        blocks = [0]
        for start, stop in pairwise(rows):
            blocks.append(blocks[-1] - (start - stop) // self.block_size)
        return np.array(rows), np.array(blocks)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, shorter ones at the end of a revision included."""
        return int(self._cuts[1][-1])

    @property
    def last_revision(self) -> tuple[int, int]:
        """The first row and block of the last revision; (0, 0) if nothing was ever appended."""
        rows, blocks = self._cuts
        return int(rows[-2]), int(blocks[-2])

    def spans(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return first row and number of rows of each block, ``[n]``.

        Raises:
            ValueError: there is no such block.
        """
        if len(blocks) and not 0 <= blocks.min() <= blocks.max() < self.num_blocks:
            raise ValueError(f"blocks {blocks}: there are {self.num_blocks}, from 0")
        rows, first = self._cuts
        revision = np.searchsorted(first, blocks, side="right") - 1
        start = rows[revision] + (blocks - first[revision]) * self.block_size
        return start, np.minimum(start + self.block_size, rows[revision + 1]) - start

    def block_rows(self, block: int) -> range:
        """Return the dataset positions of one block."""
        if not 0 <= block < self.num_blocks:
            raise DminError(
                f"block {block} does not exist: the store has {self.num_blocks}, from 0"
            )
        start, count = (int(each[0]) for each in self.spans(np.array([block])))
        return range(start, start + count)

    def revised(self, text: str, source: str) -> "Manifest":
        """Return the manifest of the next revision, read from the text of a growth file.

        Raises:
            DminError: the text is damaged.
        """
        before = Revision(self.dataset, self.num_examples)
        try:
            fields = json.loads(text)
            return replace(
                self,
                dataset=fields["dataset"],
                num_examples=fields["num_examples"],
                revisions=(*self.revisions, before),
            )
        except UNREADABLE as error:
            raise DminError(f"{source} is damaged ({error!r}): restore it from a copy.") from error

    def comparable(self) -> dict[str, Any]:
        """Return the fields that two stores must share to be compared."""
        layout = asdict(self.layout)
        del layout["dtype"]
        return {"features": self.features, "layout": layout}

    def document(self) -> dict[str, Any]:
        """Return the whole manifest as JSON values."""
        fields = asdict(self)
        revisions = fields.pop("revisions")
        if revisions:
            fields["parts"] = revisions  # its name in the file
        return {"format": FORMAT, "schema": SCHEMA, **fields}

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
                layout = Layout(**document.pop("layout"))
                return cls(layout, revisions=document.pop("parts", ()), **document)
        except UNREADABLE as error:
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
