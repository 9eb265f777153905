"""Change a finished store by adding files: append examples, or refresh metadata.

Rows are never changed. ``growth-0001.json`` has the new number of rows and the new
dataset; ``metadata.jsonl``, which is replaced by later refreshes, the metadata of the rows.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dmin.runtime.errors import DminError
from dmin.runtime.files import commit, naming, os_failure
from dmin.runtime.fingerprint import differences, fingerprint
from dmin.store.amendments import METADATA, metadata_text
from dmin.store.manifest import Manifest
from dmin.store.reader import Store
from dmin.store.removal import carry_removals, note_copy
from dmin.store.segments import growth_name, read_manifest
from dmin.store.writer import Rows, StoreWriter


def begin_revision(store: Store, dataset: dict[str, Any], more: int) -> Manifest:
    """Begin the next revision of a complete store, with room for more examples at its end.

    Existing rows keep their positions and bytes. New rows form blocks of their own, which a
    ``StoreWriter`` writes as usual.

    Args:
        store: a complete store.
        dataset: ``Manifest.dataset`` of the new revision, JSON.
        more: number of examples to append; 0 changes only ``dataset``.

    Returns:
        The manifest of the new revision.

    Raises:
        DminError: the store is incomplete, or another process has just extended it.
    """
    store.require_complete()
    before = store.manifest
    file = store.path / growth_name(len(before.revisions) + 1)
    text = json.dumps(
        {"dataset": dataset, "num_examples": before.num_examples + more}, indent=2, sort_keys=True
    )
    before.revised(text, str(file))  # raises if it could not be read back
    try:
        commit(file, f"{text}\n".encode(), overwrite=False)
    except FileExistsError:
        raise DminError(
            f"Another process has just extended {store.path}: run the command again."
        ) from None
    except OSError as error:
        raise os_failure("write", file, error) from error
    return read_manifest(store.path)


def renew_metadata(store: Store, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write metadata that replace those of the segments and any renewed earlier.

    Args:
        store: a complete store.
        entries: one mapping per row, JSON.

    Raises:
        DminError: one is not JSON, or the file cannot be written.
    """
    lines = ["null"] * store.manifest.num_examples
    rows = zip(store.positions.tolist(), store.ids, entries, strict=True)
    for position, id, entry in rows:
        lines[position] = metadata_text(id, entry)
    text = "\n".join(lines).encode()
    digest, owner = hashlib.sha256(text).hexdigest(), store.manifest.states[0].fingerprint
    head = json.dumps({"digest": digest, "store": owner}).encode()
    with naming("write", store.path / METADATA):
        commit(store.path / METADATA, head + b"\n" + text)


def append(
    target: str | os.PathLike[str],
    source: str | os.PathLike[str] | Store,
    dataset: dict[str, Any] | None = None,
    restore: bool = False,
) -> Store:
    """Append the rows of another store to a store; after an interruption, it resumes.

    For training images that were added and collected separately. Existing rows do not change.
    Readers see the previous revision until all new rows are written. A source that was appended
    before is not appended again.

    Args:
        target: a complete store.
        source: a complete store of comparable features and of other examples; any dtype.
        dataset: ``Manifest.dataset`` of the new revision; None: a list of the datasets joined.
        restore: append examples even if they were removed before.

    Raises:
        DminError: features differ (the message lists the fields), an example exists already or was
            removed, or a store is incomplete.
    """
    store = Store(target, growing=True)
    more = source if isinstance(source, Store) else Store(source)
    more.require_complete()
    lines = differences(more.manifest.comparable(), store.manifest.comparable())
    if lines:
        raise DminError(
            f"{more.path} cannot be appended to {store.path}: {'; '.join(lines)} ('here' is the "
            f"first of the two). Collect it with the settings of the other store."
        )
    added = {"dataset": more.manifest.dataset, "rows": fingerprint({"ids": more.ids})}
    before = store.manifest.dataset
    joined = dataset or {"name": before.get("name"), "joined": [*_joined(before), added]}
    if store.complete and added in _joined(before) and set(more.ids) <= set(store.ids):
        return store  # appended before
    begun = before == dataset or (not dataset and _joined(before)[-1:] == [added])
    if store.complete or not begun:
        store.require_complete()
        if twice := sorted(set(store.ids) & set(more.ids)):
            raise DminError(
                f"{store.path} has {len(twice)} of the examples of {more.path} already (such"
                f" as {twice[0]!r}): nothing was changed."
            )
        if not restore and (gone := store.removed_among(more.ids)):
            raise DminError(
                f"{len(gone)} of the examples of {more.path} were removed from {store.path}, such"
                f" as {gone[0]!r}: remove them there too, or set restore=true to bring them back."
            )
        begin_revision(store, joined, len(more))
    carry_removals(more, store.path)
    note_copy(more, target)
    manifest = read_manifest(store.path)
    start = manifest.last_revision[0]
    return write_pending(
        target, manifest, lambda rows: copied_rows(more, rows.start - start, rows.stop - start)
    )


def _joined(dataset: dict[str, Any]) -> list[Any]:
    found: list[Any] = dataset.get("joined", [{"dataset": dataset}])
    return found


def write_pending(
    target: str | os.PathLike[str], manifest: Manifest, rows: Callable[[range], Rows]
) -> Store:
    """Write the blocks that a store lacks; after an interruption, it resumes.

    Args:
        target: the store's directory.
        manifest: of the store.
        rows: a function that returns the rows of a range of dataset positions.
    """
    with StoreWriter(target, manifest) as writer:
        for block in writer.pending():
            writer.append(block, rows(manifest.block_rows(block)))
    return Store(target)


def copied_rows(
    store: Store,
    start: int,
    stop: int,
    change: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> Rows:
    """Return rows ``start:stop`` of a store for a writer, their features mapped by ``change``."""
    rows, readouts = slice(start, stop), store.layout.readouts
    return Rows(
        ids=store.ids[rows],
        metadata=store.metadata[rows],
        features={name: change(store.features(name, start, stop)) for name in readouts},
        norms={name: store.norms(name)[rows] for name in readouts},
        losses=store.losses()[rows],
    )
