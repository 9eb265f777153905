"""Remove examples from a store, its indices and cached encodings."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from dmin.runtime.errors import DminError
from dmin.runtime.files import append, naming
from dmin.store.amendments import keep_signed, read_forgotten, tombstone
from dmin.store.reader import Store

COPIES = "copies.txt"


def remove(
    store: Store, ids: Sequence[str], encodings: str | os.PathLike[str] | None = None
) -> Path:
    """Remove examples from a store: readers no longer show them, and they are not collected again.

    The store's indices and the cached encodings of these examples are deleted. Their rows and ids
    stay in the store's files until it is compacted.

    Args:
        store: the store.
        ids: of the examples.
        encodings: folder of the cached encodings, if not beside the store.

    Returns:
        The file that records the removal.

    Raises:
        DminError: the store lacks an id, or none is given.
    """
    rows = sorted({store.index(id) for id in ids})
    if not rows:
        raise DminError("There is nothing to remove: give the ids of one or more examples.")
    content = {
        "ids": [store.ids[row] for row in rows],
        "positions": store.positions[rows].tolist(),
        "store": store.manifest.states[0].fingerprint,
    }
    text = f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode()
    file = keep_signed(store.path, "removed", text)
    with naming("delete what was made of the examples beside", store.path):
        _delete_derived(store, content["positions"], encodings)
    return file


def _delete_derived(
    store: Store, positions: Sequence[int], encodings: str | os.PathLike[str] | None
) -> None:
    """Delete the store's indices and the cached encodings of the blocks of removed rows."""
    first, name = store.manifest.states[0], store.path.name
    found = list(store.path.glob("index-*"))
    beside = store.path.with_name(f"{name}.encodings")
    for root in (beside, Path(encodings or beside)):
        folder = root / first.encodings_key
        for block in {position // first.block_size for position in positions}:
            found += folder.glob(f"block-{block:08d}-*")
    if positions[-1] >= first.num_examples:  # appended: the block numbers are unknown
        found += store.path.with_name(f"{name}.more.encodings").glob("*/block-*")
    for file in found:
        file.unlink(missing_ok=True)


def carry_removals(source: Store, target: Path) -> None:
    """Write the tombstones of a source's removed examples into a store made from it.

    Raises:
        DminError: the file cannot be written.
    """
    gone = source.removed_among(source.collected_metadata()) if source.removed else []
    marks = source.forgotten.union(map(tombstone, gone)).difference(read_forgotten(target))
    if marks:
        keep_signed(target, "forgotten", json.dumps(sorted(marks)).encode())


def note_copy(source: Store, target: str | os.PathLike[str]) -> None:
    """Record where rows of a store were copied to, for later removals; errors are ignored."""
    line = f"{Path(target).resolve()}\n"
    with contextlib.suppress(OSError):
        if not (source.path / COPIES).is_file() or line not in (source.path / COPIES).read_text():
            append(source.path / COPIES, line)


def known_copies(path: Path) -> list[Path]:
    """Return the existing paths to which rows of a store, or of its copies, were copied."""
    places = [path]
    for place in places:
        if (place / COPIES).is_file():
            lines = (place / COPIES).read_text("utf-8", errors="replace").splitlines()
            places += [Path(line) for line in lines if Path(line) not in places]
    return [place for place in places[1:] if place.exists()]
