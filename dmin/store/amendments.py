"""Files that amend a store: removed rows, ids that must not return, refreshed metadata."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dmin.runtime.errors import DminError
from dmin.runtime.files import commit, naming, os_failure
from dmin.store.manifest import UNREADABLE, Manifest

FORGOTTEN_NAME = re.compile(r"forgotten-([0-9a-f]{16})\.json")
METADATA = "metadata.jsonl"
REMOVED_NAME = re.compile(r"removed-([0-9a-f]{16})\.json")


def removed_rows(path: Path, manifest: Manifest) -> tuple[list[str], np.ndarray]:
    """Return the files that record removed rows, and the dataset positions of these rows.

    Raises:
        DminError: such a file is damaged or of another store. The store is then not read, because
            a removed example might reappear.
    """
    remedy = (
        "Or delete it and remove the examples again; the ids that can still be read in it say which"
    )
    files = dict(_signed(path, REMOVED_NAME, remedy))
    found: set[int] = set()
    for name, content in files.items():
        if content["store"] != manifest.states[0].fingerprint:
            raise DminError(f"{path / name} was written for another store: move it away.")
        found.update(content["positions"])
    return list(files), np.array(sorted(found), dtype=np.int64)


def keep_signed(path: Path, kind: str, text: bytes) -> Path:
    """Write ``<kind>-<digest of its bytes>.json`` into a store and return its path.

    Raises:
        DminError: it could not be written.
    """
    file = path / f"{kind}-{hashlib.sha256(text).hexdigest()[:16]}.json"
    with naming("write", file):
        commit(file, text)
    return file


def _signed(path: Path, pattern: re.Pattern[str], remedy: str) -> Iterator[tuple[str, Any]]:
    """Yield name and content of files written by ``keep_signed``; refuse a damaged one."""
    for name in sorted(filter(pattern.fullmatch, os.listdir(path))):
        with naming("read", path / name):
            text = (path / name).read_bytes()
        digest = hashlib.sha256(text).hexdigest()[:16]
        if not name.endswith(f"-{digest}.json"):
            raise DminError(
                f"{path / name} is damaged (the digest of its bytes is {digest}): restore it from a"
                f" copy. {remedy}."
            )
        yield name, json.loads(text)


def tombstone(id: str) -> str:
    """Return the hash by which the id of a removed example is recognised later."""
    return hashlib.sha256(f"removed {id}".encode()).hexdigest()[:32]


def read_forgotten(path: Path) -> frozenset[str]:
    """Return the tombstones of examples that were removed from a store's sources.

    Raises:
        DminError: a file of tombstones is damaged.
    """
    remedy = (
        "It lists the removed examples that must not come back: without a copy, compact the store "
        "again"
    )
    return frozenset(id for _, ids in _signed(path, FORGOTTEN_NAME, remedy) for id in ids)


def read_metadata(path: Path, manifest: Manifest) -> tuple[str, list[bytes]]:
    """Return the metadata renewed after collection: their digest, and one line per position.

    Both are empty if none were renewed. A line is ``null`` where the row was removed or missing.

    Raises:
        DminError: the file is damaged or of another store.
    """
    file = path / METADATA
    try:
        head, *lines = file.read_bytes().split(b"\n")
        said = json.loads(head)
        digest, written_for = said["digest"], said["store"]
    except FileNotFoundError:
        return "", []
    except OSError as error:
        raise os_failure("read", file, error) from error
    except UNREADABLE:
        digest, written_for = "", manifest.states[0].fingerprint
    if digest != hashlib.sha256(b"\n".join(lines)).hexdigest():
        raise DminError(
            f"{file} is damaged: restore it from a copy, or delete it (metadata are then those of"
            " the collection) and run `dmin store metadata` again."
        )
    if written_for != manifest.states[0].fingerprint:
        raise DminError(f"{file} was written for another store: move it away.")
    return digest, lines


def is_moved(path: Path, manifest: Manifest) -> bool:
    """Whether a store's rows may be in another order than the dataset of its manifest."""
    return bool(manifest.revisions or list(path.glob("forgotten-*.json")))


def metadata_text(id: str, entry: Mapping[str, Any]) -> str:
    """Return the metadata of an example as a line of JSON, or raise DminError."""
    try:
        return json.dumps(entry, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DminError(
            f"The metadata of example {id!r} cannot be written as JSON ({error}): use only"
            " mappings, lists, texts, finite numbers, booleans and null."
        ) from error
