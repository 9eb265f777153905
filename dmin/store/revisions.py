"""How a finished store changes: examples are appended, or taken out, by new files.

Nothing that was written is ever changed. ``growth-0001.json`` says how many rows there are to be
from now on, and of which dataset; ``removed-<digest>.json`` which rows no reader may show any more.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmin.runtime.errors import DminError
from dmin.runtime.files import commit, os_failure
from dmin.store.manifest import Manifest
from dmin.store.reader import Store
from dmin.store.segments import growth_name, read_manifest


def begin_revision(store: Store, dataset: dict[str, Any], more: int) -> Manifest:
    """Make room for more examples behind those of a complete store: its next revision.

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
    file = store.path / growth_name(len(before.revisions) + 1)
    text = json.dumps(
        {"dataset": dataset, "num_examples": before.num_examples + more}, indent=2, sort_keys=True
    )
    before.revised(text, str(file))  # what cannot be read back is not written
    try:
        commit(file, f"{text}\n".encode(), overwrite=False)
    except FileExistsError:
        raise DminError(
            f"Another process has made {store.path} grow just now: run the command again."
        ) from None
    except OSError as error:
        raise os_failure("write", file, error) from error
    return read_manifest(store.path)


def remove(store: Store, ids: Sequence[str]) -> Path:
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
        "store": store.manifest.states[0].fingerprint,
    }
    text = f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode()
    file = store.path / f"removed-{hashlib.sha256(text).hexdigest()[:16]}.json"
    try:
        commit(file, text)
    except OSError as error:
        raise os_failure("write", file, error) from error
    return file
