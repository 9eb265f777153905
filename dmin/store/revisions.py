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
            f"Another process has just extended {store.path}: run the command again."
        ) from None
    except OSError as error:
        raise os_failure("write", file, error) from error
    return read_manifest(store.path)


def renew_metadata(store: Store, entries: Sequence[Mapping[str, Any]]) -> None:
    """Keep other metadata than the segments have; what was renewed before is replaced.

    Args:
        store: complete.
        entries: one for each row, JSON.

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
    """Put the rows of another store behind those of a store; stopped, it resumes.

    For training images that were added and collected apart. Rows that are there are not touched;
    until all new ones are there, the store is to readers what it was. What was appended before
    is not appended again.

    Args:
        target: a complete store.
        source: a complete store of the same features, of other examples; any dtype.
        dataset: what the dataset is from then on; if None, a list of what was put together.
        restore: take back examples that were removed.

    Raises:
        DminError: features differ, named field by field; an example is there already; or the store
            is incomplete.
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
        return store  # it was done before
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
    """Write the blocks that a store does not have yet; stopped, it resumes.

    Args:
        target: the store's directory.
        manifest: of the store.
        rows: returns those of some places in the dataset.
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
    """Return rows ``start:stop`` of a store as a writer takes them, their features changed."""
    rows, readouts = slice(start, stop), store.layout.readouts
    return Rows(
        ids=store.ids[rows],
        metadata=store.metadata[rows],
        features={name: change(store.features(name, start, stop)) for name in readouts},
        norms={name: store.norms(name)[rows] for name in readouts},
        losses=store.losses()[rows],
    )
