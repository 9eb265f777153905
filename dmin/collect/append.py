"""Extend a store when its dataset has grown: collect the new examples, then append them."""

import shutil
import warnings
from pathlib import Path
from typing import Any

from dmin.collect.resume import GradientCollector
from dmin.data.base import Dataset
from dmin.data.ids import ids_of
from dmin.data.subset import Subset
from dmin.runtime.errors import DminError, DminWarning
from dmin.store import Store
from dmin.store.comparison import manifest_differences
from dmin.store.revisions import append, begin_revision


def collect_more(
    collector: GradientCollector,
    dataset: Dataset,
    path: str | Path,
    restore: bool = False,
    **options: Any,
) -> Store:
    """Collect the examples of a dataset that a finished store has not, into that store.

    Examples are known by their ids: rows that are there are neither computed again nor moved, the
    new ones come behind them. They are collected into ``<path>.more`` first, which resumes and is
    shared out like any store, and is deleted in the end. From then on the store is one of the
    dataset as it is now. Examples that were removed from the store, or from one that it was made
    of, are not collected again, which a warning says.

    Args:
        collector: as the store was collected with.
        dataset: with the existing examples and more.
        path: of a complete store.
        restore: also collect examples that were removed.
        options: of :meth:`GradientCollector.collect`.

    Returns:
        The store; without the new examples while other shards are not finished.

    Raises:
        DminError: the store has other features, or examples that the dataset lacks.
    """
    path = Path(path)
    store, aside = Store(path, growing=True), path.with_name(f"{path.name}.more")
    here = collector.manifest(dataset, store.manifest.block_size, store.layout.dtype, path=path)
    said = manifest_differences(here, store.manifest, counted=False)
    said.pop("the dataset changed since collection", None)
    if said:
        lines = "; ".join(line for lines in said.values() for line in lines)
        raise DminError(
            f"{path} cannot be extended by this collector's rows: {lines} ('here' is this command, "
            f"'there' the store). Use the store's settings."
        )
    same = store.manifest.dataset == here.dataset
    begun = same and not store.complete
    if not begun:
        store.require_complete()
    ids = list(ids_of(dataset))
    _require_all(store, ids)
    start = store.manifest.last_revision[0] if begun else store.manifest.num_examples
    rows = zip(store.ids, store.positions.tolist(), strict=True)
    known, gone = {id for id, row in rows if row < start}, store.removed_among(ids)
    if gone and not restore:
        known.update(gone)
        warnings.warn(
            f"{len(gone):,} of the examples were removed from {path}, such as {gone[0]!r}: they "
            f"are left out. Set collect.restore=true to collect them again.",
            DminWarning,
            stacklevel=2,
        )
    new = [id for id in ids if id not in known]
    if not new:
        if not same:
            begin_revision(store, here.dataset, 0)
        return Store(path)
    options = {**options, "block_size": here.block_size, "dtype": here.layout.dtype}
    more = collector.collect(Subset(dataset, ids=new), aside, **options)
    if not more.complete:
        return store
    store = append(path, more, here.dataset, restore)
    shutil.rmtree(aside)
    return store


def _require_all(store: Store, ids: list[str]) -> None:
    gone = sorted(set(store.ids) - set(ids))
    if gone:
        raise DminError(
            f"The store {store.path} has {len(gone)} examples that are no longer in the dataset, "
            f"such as {gone[0]!r}: remove them from the store first (`dmin store remove "
            f"{store.path} {gone[0]} ...`), or restore them in the dataset."
        )
