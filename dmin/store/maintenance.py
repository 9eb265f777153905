"""Operations on finished stores: merge, fold, convert, compact. Sources never change."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dmin.runtime.errors import DminError
from dmin.runtime.files import commit, naming
from dmin.runtime.fingerprint import differences
from dmin.store.amendments import FORGOTTEN_NAME, METADATA
from dmin.store.catalog import Catalog
from dmin.store.manifest import Manifest
from dmin.store.reader import Store
from dmin.store.removal import carry_removals, note_copy
from dmin.store.revisions import copied_rows
from dmin.store.segments import read_manifest
from dmin.store.writer import SEGMENT_BYTES, Rows, StoreWriter


def info(store: Store) -> dict[str, Any]:
    """Return a summary of a store, as JSON values."""
    layout, manifest = store.layout, store.manifest
    size = sum(file.stat().st_size for file in store.path.glob("segment-*.h5"))
    return {
        "path": str(store.path),
        "rows": len(store),
        "examples": manifest.num_examples,
        "missing blocks": len(store.missing_blocks),
        "blocks held twice": store.duplicate_blocks,
        "removed": store.removed,
        "grown": len(manifest.revisions),
        "growing": store.planned.num_examples - manifest.num_examples,
        "metadata renewed": bool(store.metadata_digest),
        "segments": len(list(store.path.glob("segment-*.h5"))),
        "bytes": size,
        "bytes an example": round(size / max(1, len(store))),
        "dtype": layout.dtype,
        "readouts": list(layout.readouts),
        "draws": layout.draws,
        "timesteps": list(layout.timesteps),
        "groups": list(layout.groups),
        "dim": layout.dim,
        "dataset": manifest.dataset.get("name"),
        "feature fingerprint": manifest.feature_fingerprint,
        "dataset fingerprint": manifest.dataset_fingerprint,
        "fingerprint": manifest.fingerprint,
    }


def verify(path: str | os.PathLike[str]) -> Store:
    """Read every byte of a store, check it, and return the store.

    The digest of every segment is computed again, whatever the catalog says. Metadata must be JSON
    mappings, features and norms finite.

    Raises:
        DminError: names the damaged files, or the first row with values that are not finite.
    """
    Catalog.of(Path(path), read_manifest(Path(path)), afresh=True)
    store = Store(path)
    store.metadata[:]
    for readout in store.layout.readouts:
        for block in store.blocks(readout):
            finite = np.isfinite(block.features).all((1, 2, 3, 4)) & np.isfinite(block.norms).all(
                (1, 2, 3)
            )
            if not finite.all():
                row = block.start + int(np.argmin(finite))
                raise DminError(
                    f"The store {store.path} has values that are not finite in {readout!r} of"
                    f" example {store.ids[row]!r} (row {row}): it was not written by dmin. Collect"
                    " it again."
                )
    return store


def merge(sources: Sequence[str | os.PathLike[str]], target: str | os.PathLike[str]) -> Store:
    """Copy the segments of stores with equal manifests into a new store, or into one of them.

    For parts of one dataset that were collected separately. A segment is copied if it has a block
    that the target lacks.

    Raises:
        DminError: manifests differ (the message lists the fields), or a file could not be copied.
    """
    stores = [Store(path) for path in sources]
    if not stores:
        raise DminError("There is nothing to merge: give one or more stores as sources.")
    first, target = stores[0].manifest, Path(target)
    for other in stores[1:]:
        lines = differences(first.document(), other.manifest.document())
        if lines:
            raise DminError(
                f"{other.path} cannot be merged with {stores[0].path}: {'; '.join(lines)} ('here' "
                "is the first store). Only parts of one collection can be merged."
            )
    renewed = {store.metadata_digest: store for store in stores if store.metadata_digest}
    if len(renewed) > 1:
        raise DminError(
            f"{' and '.join(str(each.path) for each in renewed.values())} have different metadata:"
            " run `dmin store metadata` on each with the same data first."
        )
    with StoreWriter(target, first) as writer:
        missing = set(writer.pending())
    for each in renewed.values():
        _copy(each.path / METADATA, target)
    for store in stores:
        for file in (*store.removals, *filter(FORGOTTEN_NAME.fullmatch, os.listdir(store.path))):
            _copy(store.path / file, target)
        note_copy(store, target)
        for segment in store.segments:
            if missing.intersection(segment.blocks.tolist()):
                _copy(segment.path, target)
                missing.difference_update(segment.blocks.tolist())
    return Store(target)


def _copy(file: Path, target: Path) -> None:
    with naming("copy a segment into", target):
        commit(target / file.name, file.read_bytes())


def fold(store: Store, target: str | os.PathLike[str], dim: int, dtype: str | None = None) -> Store:
    """Write a store with a smaller sketch: ``y[c] = Σ_{j mod k' = c} x[j]``.

    Except for rounding of the stored values, the result equals a sketch of k' dimensions. No model
    is needed.

    Args:
        store: a complete store whose sketch can be folded.
        target: a new directory.
        dim: k', a divisor of k.
        dtype: of the new store; the same if None.

    Raises:
        DminError: the sketch cannot be folded, or k' is not allowed.
    """
    layout = store.layout
    sketch = store.manifest.features.get("sketch", {})
    folds = sketch.get("folds") if isinstance(sketch, dict) else None
    if folds is None:
        family = sketch.get("family") if isinstance(sketch, dict) else sketch
        raise DminError(
            f"The sketch {family!r} cannot be folded. Collect again with sketch.dim={dim}, or with "
            f"a sketch that can be folded, such as block_cyclic."
        )
    if not 1 <= dim < layout.dim or layout.dim % dim or dim % folds:
        allowed = [k for k in range(folds, layout.dim, folds) if layout.dim % k == 0][-6:]
        raise DminError(
            f"A sketch of {layout.dim} dimensions cannot be folded to {dim}: choose a smaller "
            + (f"divisor that is a multiple of {folds}" if folds > 1 else "divisor")
            + (f", such as {', '.join(map(str, allowed))}." if allowed else "; there is none.")
        )
    features = {**store.manifest.features, "sketch": {**sketch, "dim": dim}}

    manifest = replace(
        compacted_manifest(store),
        layout=replace(layout, dim=dim, dtype=dtype or layout.dtype),
        features=features,
    )
    return rewrite(
        store, target, manifest, lambda rows: rows.reshape(*rows.shape[:4], -1, dim).sum(4)
    )


def convert(store: Store, target: str | os.PathLike[str], dtype: str) -> Store:
    """Write a store of the same rows in another dtype."""
    manifest = replace(compacted_manifest(store), layout=replace(store.layout, dtype=dtype))
    return rewrite(store, target, manifest)


def compact(store: Store, target: str | os.PathLike[str], segment_bytes: int = 256 << 20) -> Store:
    """Write a store of the same rows in a few large segments, without duplicate or removed rows."""
    return rewrite(store, target, compacted_manifest(store), segment_bytes=segment_bytes)


def compacted_manifest(store: Store) -> Manifest:
    """Return the manifest of a new store with the rows that a store shows.

    It does not count removed examples, and has no revisions.

    Raises:
        DminError: rows were removed or appended and the store is incomplete; or no row is left.
    """
    if not store.removed and not store.manifest.revisions:
        return store.manifest
    store.require_complete()
    if not len(store):
        raise DminError(f"Every row of {store.path} was removed: there is nothing to write.")
    return replace(store.manifest, num_examples=len(store), revisions=())


def rewrite(
    store: Store,
    target: str | os.PathLike[str],
    manifest: Manifest,
    change: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
    segment_bytes: int = SEGMENT_BYTES,
) -> Store:
    """Write the rows of a store under another manifest, one block at a time.

    After an interruption, it resumes.

    Args:
        store: the source.
        target: another directory.
        manifest: of the target.
        change: a function applied to features ``[n, draw, T, group, k]``.
        segment_bytes: see :class:`StoreWriter`.
    """
    target = Path(target)
    if target.resolve() == store.path.resolve():
        raise DminError(f"{target} is the source itself: choose a new directory.")
    absent = set(store.missing_blocks)
    with StoreWriter(target, manifest, segment_bytes=segment_bytes) as writer:
        carry_removals(store, target)
        note_copy(store, target)
        for block in writer.pending():
            if block not in absent:
                writer.append(block, _block(store, manifest.block_rows(block), change))
    return Store(target)


def _block(store: Store, within: range, change: Callable[[np.ndarray], np.ndarray]) -> Rows:
    """Return the rows of a block of the target, from a store that may be incomplete."""
    if store.complete:  # the target's rows are the rows shown, in order
        return copied_rows(store, within.start, within.stop, change)
    start, stop = np.searchsorted(store.positions, [within.start, within.stop]).tolist()
    return copied_rows(store, start, stop, change)
