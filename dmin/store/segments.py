"""The segment files of a store: their contents, writing and verification."""

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import h5py
import numpy as np

from dmin.runtime.errors import DminError
from dmin.runtime.files import ENDLESS, endless, naming, os_failure
from dmin.runtime.formatting import spans
from dmin.store.manifest import MANIFEST, UNREADABLE, Manifest

SEGMENT_NAME = re.compile(r"segment-\d{8,}-([0-9a-f]{16})\.h5")
GROWTH_NAME = re.compile(r"growth-\d{4,}\.json")


class Content(NamedTuple):
    """The contents of one block in a segment: JSON texts and arrays, one entry per row."""

    texts: dict[str, list[str]]
    arrays: dict[str, np.ndarray]


class Segment(NamedTuple):
    """One sealed file and the numbers of its blocks."""

    path: Path
    blocks: np.ndarray


class Damaged(Exception):
    """A segment differs from what was sealed."""


Held = TypeVar("Held")  # what is read from a segment; has the attribute ``blocks``


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the store in a directory, including its revisions.

    Raises:
        DminError: there is no store, or its manifest is damaged.
    """
    with naming("read", path):
        for entry in os.scandir(path) if path.is_dir() else ():
            known = entry.is_file() or entry.name.endswith((".kept", ".tmp"))
            if not known and endless(Path(entry.path)):
                raise DminError(f"{entry.path} is a {ENDLESS}, not a store's file: move it away.")
    file = path / MANIFEST
    manifest = Manifest.from_json(_text(path, file), str(file))
    for number, name in enumerate(sorted(filter(GROWTH_NAME.fullmatch, os.listdir(path))), 1):
        file = path / growth_name(number)
        if name != file.name:
            raise DminError(f"{file} is missing, but {name} exists: restore it from a copy.")
        manifest = manifest.revised(_text(path, file), str(file))
    return manifest


def growth_name(number: int) -> str:
    """Return the name of the file that describes a store's n-th extension, counted from 1."""
    return f"growth-{number:04d}.json"


def _text(path: Path, file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = f"{path} is not a store (it has no {MANIFEST})"
        if not path.is_dir():
            missing = f"There is no store at {path}"
        raise DminError(
            f"{missing}: check the path, or make a store with `dmin collect`."
        ) from error
    except OSError as error:
        raise os_failure("read", file, error) from error
    except UnicodeDecodeError as error:
        raise DminError(
            f"{file} is damaged ({error}): restore it from a copy, or collect into a new directory."
        ) from error


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open a segment for reading.

    Segments never change, so no lock is taken: locks fail on some network file systems.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno:
            raise os_failure("read", path, error) from error
        raise DminError(
            f"{path} differs from what was sealed and verified ({' '.join(str(error).split())}): "
            f"run `dmin store verify` on the store, delete the files that it lists and collect "
            f"again."
        ) from error


def dataset(
    file: h5py.File, name: str, kind: Any = None, shape: tuple[int, ...] | None = None
) -> h5py.Dataset:
    """Return an HDF5 dataset of a segment, after checking that its data are in this file.

    Raises:
        KeyError: there is none.
        ValueError: it refers to another file, or has another type or shape than the one given.
    """
    parts = name.split("/")
    links = [file.get("/".join(parts[:end]), getlink=True) for end in range(1, len(parts) + 1)]
    found = file[name] if all(isinstance(link, h5py.HardLink) for link in links) else None
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        raise ValueError(f"{name} is not in this file")
    if kind is not None and (found.dtype, found.shape) != (kind, shape):
        raise ValueError(f"{name} is {found.dtype} {found.shape}, not {kind} {shape}")
    return found


def encode_segment(manifest: Manifest, blocks: Mapping[int, Content]) -> memoryview:
    """Return the bytes of a segment, the same for the same content.

    The file is made in memory. So its digest covers what was meant to be written, and a full disk
    fails in an ordinary write, not inside HDF5, which may never close a file that it cannot flush.

    Args:
        manifest: of the store; its fingerprint is written into the segment.
        blocks: the contents by block number, in any order.
    """
    numbers = sorted(blocks)
    rows = [row for number in numbers for row in manifest.block_rows(number)]
    first = blocks[numbers[0]]
    buffer = io.BytesIO()
    # Large arrays start at multiples of 64 bytes, so that they can be memory-mapped.
    with h5py.File(buffer, "w", alignment_threshold=1024, alignment_interval=64) as file:
        file.attrs["manifest"] = manifest.fingerprint
        file["blocks"] = np.asarray(numbers, dtype="<i8")
        file["rows"] = np.asarray(rows, dtype="<i8")
        for name in first.texts:
            # One buffer of JSON: HDF5 is slow with a million strings.
            lines = [line for number in numbers for line in blocks[number].texts[name]]
            text = "[" + ",\n".join(lines) + "]"
            file[name] = np.frombuffer(text.encode(), dtype=np.uint8)
        for name, like in first.arrays.items():
            dataset = file.create_dataset(name, (len(rows), *like.shape[1:]), like.dtype)
            start = 0
            for number in numbers:
                part = blocks[number].arrays[name]
                dataset[start : start + len(part)] = part
                start += len(part)
    return buffer.getbuffer()


def segment_name(first_block: int, content: memoryview) -> str:
    """Return the name of a segment: its first block, and the digest of its bytes."""
    return f"segment-{first_block:08d}-{hashlib.sha256(content).hexdigest()[:16]}.h5"


def open_segments(
    path: Path, manifest: Manifest, verify: bool, known: Mapping[str, Segment] | None = None
) -> dict[str, Segment]:
    """Find the sealed segments of a store.

    Args:
        path: the store.
        manifest: the store's.
        verify: compare the digest of each file with its name.
        known: segments that were already read, by name; they are not opened again.

    Returns:
        The segments by name, in the order of their names.

    Raises:
        DminError: segments are damaged (all are named), or were written for another manifest.
    """

    def look(file: Path) -> Segment:
        with opened_segment(file, manifest, verify) as (_, blocks):
            manifest.spans(blocks)
            return Segment(file, blocks)

    with naming("read", path):
        names = segment_names(path)
    return read_segments(path, manifest, names, known or {}, look)


def read_segments(
    path: Path,
    manifest: Manifest,
    names: Sequence[str],
    known: Mapping[str, Held],
    read: Callable[[Path], Held],
) -> dict[str, Held]:
    """Read segments of a store, several at a time.

    Args:
        path: the store.
        manifest: the store's.
        names: of the segments.
        known: segments that were already read, by name; they are not read again.
        read: returns the contents of a segment, with ``blocks``; raises :class:`Damaged`.

    Raises:
        DminError: segments are damaged (all are named), or cannot be read.
    """

    def look(name: str) -> Held | Damaged:
        try:
            return known.get(name) or read(path / name)
        except Damaged as error:
            return error

    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = dict(zip(names, pool.map(look, names), strict=True))
    except OSError as error:
        raise os_failure("read", Path(error.filename or path), error) from error
    damage = {name: str(each) for name, each in found.items() if isinstance(each, Damaged)}
    sound = {name: each for name, each in found.items() if not isinstance(each, Damaged)}
    if damage:
        raise _damaged(path, manifest, damage, sound)
    return sound


def segment_names(path: Path) -> list[str]:
    """Return the names of the sealed segments of a store, sorted."""
    return sorted(name for name in os.listdir(path) if SEGMENT_NAME.fullmatch(name))


@contextlib.contextmanager
def opened_segment(
    path: Path, manifest: Manifest, verify: bool
) -> Iterator[tuple[h5py.File, np.ndarray]]:
    """Open a segment of a store that may be damaged.

    Args:
        path: the file.
        manifest: of the store.
        verify: compare the digest of its bytes with its name.

    Yields:
        The file, and its blocks.

    Raises:
        Damaged: says what is wrong, also if the caller's own reading fails.
        OSError: the file cannot be read, which does not mean that it is damaged.
    """
    with open(path, "rb") as raw:
        digest = hashlib.file_digest(raw, "sha256").hexdigest()[:16] if verify else ""
    if verify and not path.stem.endswith(f"-{digest}"):
        raise Damaged(f"the digest of its bytes is {digest}")
    try:
        with h5py.File(path, "r", locking=False) as file:
            require_own(path, file.attrs["manifest"], manifest)
            yield file, dataset(file, "blocks")[:]
    except UNREADABLE as error:
        raise Damaged(f"HDF5 cannot read it: {error}") from error


def require_own(path: Path, written_for: str, manifest: Manifest) -> None:
    """Raise DminError unless a segment was written for the store it lies in."""
    if written_for not in manifest.fingerprints:
        raise DminError(
            f"{path} was written for a store with manifest {written_for}, but {MANIFEST} beside it"
            f" is {manifest.fingerprint}: if the file was copied here, move it away; if {MANIFEST} "
            f"was edited, restore it."
        )


def _damaged(
    path: Path, manifest: Manifest, damage: Mapping[str, str], sound: Mapping[str, Any]
) -> DminError:
    """Name the damaged files and the rows that no sound file has."""
    there = (each.blocks.tolist() for each in sound.values())
    missing = set(range(manifest.num_blocks)).difference(*there)
    lost = [row for block in sorted(missing) for row in manifest.block_rows(block)]
    files = "; ".join(f"{name} ({reason})" for name, reason in damage.items())
    begins = ", ".join(str(manifest.block_rows(int(name.split("-")[1])).start) for name in damage)
    return DminError(
        f"The store {path} has damaged segments: {files}. Their rows begin at {begins}; no sound"
        f" segment has the rows {spans(lost) or '(none)'} of {manifest.num_examples}. Delete each "
        "of these files and run the same `dmin collect` command again: only the missing "
        "blocks are computed."
    )
