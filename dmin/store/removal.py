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
    """Take examples out of a store: no reader shows them from now on, and nothing collects them.

    Indices of the store and encodings kept of these examples are deleted. Their rows and ids stay
    in the store's own files until it is compacted.

    Args:
        store: that has them.
        ids: of the examples.
        encodings: where they were kept, if not beside the store.

    Returns:
        The file that says so.

    Raises:
        DminError: an id is not there, or none is given.
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
    """Delete what was made of rows, or is kept of them beside the store."""
    first, name = store.manifest.states[0], store.path.name
    found = list(store.path.glob("index-*"))
    beside = store.path.with_name(f"{name}.encodings")
    for root in (beside, Path(encodings or beside)):
        folder = root / first.encodings_key
        for block in {position // first.block_size for position in positions}:
            found += folder.glob(f"block-{block:08d}-*")
    if positions[-1] >= first.num_examples:  # of those it grew by, whose numbers are not known
        found += store.path.with_name(f"{name}.more.encodings").glob("*/block-*")
    for file in found:
        file.unlink(missing_ok=True)


def carry_removals(source: Store, target: Path) -> None:
    """Have a store that is made of another know whom not to take back.

    Raises:
        DminError: that cannot be written.
    """
    gone = source.removed_among(source.collected_metadata()) if source.removed else []
    marks = source.forgotten.union(map(tombstone, gone)).difference(read_forgotten(target))
    if marks:
        keep_signed(target, "forgotten", json.dumps(sorted(marks)).encode())


def note_copy(source: Store, target: str | os.PathLike[str]) -> None:
    """Note where rows of a store were copied to, for whoever has to remove some; if it can be."""
    line = f"{Path(target).resolve()}\n"
    with contextlib.suppress(OSError):
        if not (source.path / COPIES).is_file() or line not in (source.path / COPIES).read_text():
            append(source.path / COPIES, line)


def known_copies(path: Path) -> list[Path]:
    """Return where rows of a store are known to have been copied to, as far as it is there."""
    places = [path]
    for place in places:
        if (place / COPIES).is_file():
            lines = (place / COPIES).read_text("utf-8", errors="replace").splitlines()
            places += [Path(line) for line in lines if Path(line) not in places]
    return [place for place in places[1:] if place.exists()]
