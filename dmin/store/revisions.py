"""How a finished store changes: it grows by new files, and rows are taken out by new files.

Nothing that was written is ever changed. ``growth-0001.json`` says how many rows there are to be
from now on, and of which dataset; ``removed-<digest>.json`` which rows no reader may show any more.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmin.runtime.errors import DminError
from dmin.runtime.files import commit, os_failure
from dmin.store.manifest import Manifest
from dmin.store.segments import growth_name, read_manifest

if TYPE_CHECKING:
    from dmin.store.reader import Store

REMOVED_NAME = re.compile(r"removed-([0-9a-f]{16})\.json")


def grow(store: "Store", dataset: dict[str, Any], more: int) -> Manifest:
    """Make room for more examples behind those of a complete store.

    Rows that are there keep their places and bytes; the new ones are blocks of their own, to be
    written by a ``StoreWriter`` as usual.

    Args:
        store: complete.
        dataset: what the dataset is from now on, JSON.
        more: examples to come; 0 only says that the dataset is now another.

    Returns:
        The manifest from now on.

    Raises:
        DminError: the store is incomplete, or another process made it grow just now.
    """
    store.require_complete()
    before = store.manifest
    file = store.path / growth_name(len(before.parts) + 1)
    text = json.dumps(
        {"dataset": dataset, "num_examples": before.num_examples + more}, indent=2, sort_keys=True
    )
    before.grown(text, str(file))  # what cannot be read back is not written
    try:
        commit(file, f"{text}\n".encode(), overwrite=False)
    except FileExistsError:
        raise DminError(
            f"Another process has made {store.path} grow just now: run the command again."
        ) from None
    except OSError as error:
        raise os_failure("write", file, error) from error
    return read_manifest(store.path)


def remove(store: "Store", ids: Sequence[str]) -> Path:
    """Take examples out of a store: no reader shows them from now on.

    Their bytes stay until the store is compacted.

    Returns:
        The file that says so.

    Raises:
        DminError: an id is not there, or none is given.
    """
    rows = sorted({store.index(id) for id in ids})
    if not rows:
        raise DminError("There is nothing to remove: name the ids of one example or more.")
    content = {
        "ids": [store.ids[row] for row in rows],
        "positions": store.positions[rows].tolist(),
        "store": _origin(store.manifest),
    }
    text = f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode()
    file = store.path / f"removed-{hashlib.sha256(text).hexdigest()[:16]}.json"
    try:
        commit(file, text)
    except OSError as error:
        raise os_failure("write", file, error) from error
    return file


def removed_rows(path: Path, manifest: Manifest) -> tuple[list[str], np.ndarray]:
    """Return the files that take rows out of a store, and the positions of these rows.

    Raises:
        DminError: such a file is damaged or of another store: rather than that an example comes
            back, nothing is read.
    """
    names = sorted(filter(REMOVED_NAME.fullmatch, os.listdir(path)))
    found: set[int] = set()
    for name in names:
        try:
            text = (path / name).read_bytes()
        except OSError as error:
            raise os_failure("read", path / name, error) from error
        digest = hashlib.sha256(text).hexdigest()[:16]
        if name != f"removed-{digest}.json":
            raise DminError(
                f"{path / name} is damaged (the digest of its bytes is {digest}): restore it from a"
                " copy. Or delete it and remove the examples again; the ids that can still be read"
                " in it say which."
            )
        content = json.loads(text)
        if content["store"] != _origin(manifest):
            raise DminError(f"{path / name} was written for another store: move it away.")
        found.update(content["positions"])
    return names, np.array(sorted(found), dtype=np.int64)


def _origin(manifest: Manifest) -> str:
    """Return the fingerprint that a store had before it ever grew."""
    return manifest.states[0].fingerprint
