"""The description of a store's dataset, by which stores are found and metadata refreshed."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmin.data.base import Dataset, Facts, describe_dataset, describe_fully
from dmin.data.ids import facts_at, facts_of, ids_of, positions_of
from dmin.runtime.errors import DminError, DminWarning
from dmin.runtime.fingerprint import differences, fingerprint
from dmin.store import Manifest, Store
from dmin.store.comparison import manifest_differences
from dmin.store.manifest import MANIFEST
from dmin.store.revisions import begin_revision, renew_metadata
from dmin.store.segments import read_manifest


def describe(dataset: Dataset, columns: Sequence[str] = ()) -> dict[str, Any]:
    """Return, as JSON, what identifies the inputs of a dataset's gradients.

    Args:
        dataset: the examples.
        columns: metadata columns that the model reads.
    """
    found = describe_dataset(dataset)
    if columns:
        rows = [[(f.metadata or {}).get(name) for name in columns] for f in facts_of(dataset)]
        found["columns"] = {"names": list(columns), "content": fingerprint({"rows": rows})}
    return found


def as_found(
    manifest: Manifest, dataset: Dataset, path: Path, beside: Mapping[str, Any] | None = None
) -> Manifest:
    """Return the manifest in the form of an existing store with all metadata in its fingerprint.

    Args:
        manifest: of a dataset.
        dataset: the dataset.
        path: of an existing or future store.
        beside: further entries of the manifest about its dataset.
    """
    if not (path / MANIFEST).is_file():
        return manifest
    there = read_manifest(path)
    alike = there.comparable() == manifest.comparable()
    if "schema" in there.dataset or there.dataset == manifest.dataset or not alike:
        return manifest
    former = {**describe_fully(dataset), **(beside or {})}
    return replace(manifest, dataset=former) if former == there.dataset else manifest


def place_of(
    place: Path, manifest: Manifest, dataset: Dataset, beside: Mapping[str, Any] | None = None
) -> Path:
    """Return the path of a store, or of an older one with the same contents.

    Args:
        place: the path before the fingerprint.
        manifest: of the store, as is the next.
        dataset: the examples.
        beside: as for :func:`as_found`.
    """
    path = place.with_name(f"{place.name}{manifest.fingerprint}")
    for file in [] if path.exists() else sorted(place.parent.glob(f"{place.name}*/{MANIFEST}")):
        there, here = read_manifest(file.parent), as_found(manifest, dataset, file.parent, beside)
        if not manifest_differences(here, there, counted=not there.revisions):
            return file.parent
    return path


def refresh_metadata(path: str | Path, dataset: Dataset, same_images: bool = False) -> Store:
    """Take the metadata of a dataset over into the complete store that was collected from it.

    Rows are not touched. Images, labels and captions must be those that were collected: the store
    has their digest.

    Args:
        path: of the store.
        dataset: as it is now.
        same_images: assume that the images are the same, if they cannot be
            compared; ids, labels and captions are still compared.

    Raises:
        DminError: the store is incomplete, or more than metadata changed.
    """
    store = Store(path)
    store.require_complete()
    ids, facts = list(ids_of(dataset)), list(facts_of(dataset))
    _require_ids(store, ids)
    known = dict(zip(ids, facts, strict=True))
    columns, kept = _columns(store), store.manifest.dataset
    described = describe(dataset, columns)
    old = described if "schema" in kept else describe_fully(dataset, store.collected_metadata())
    lines = differences(old, {name: kept.get(name) for name in old})
    if same_images:
        lines = _changed(store, known, ("label", "caption", *columns))
    elif "schema" not in kept:
        lines += _changed(store, known, columns)
    if lines:
        raise DminError(
            f"{store.path} was collected from other data: {'; '.join(lines)} ('here' is the "
            f"data given now). Only metadata other than labels and captions can be refreshed: "
            f"give the same label and caption columns (label=, text=) and source of "
            f"captions (layout=plain: only metadata files), or, if the images are the same and "
            f"were only rewritten or partly removed, set same_images=true."
        )
    renew_metadata(store, [known[id].describe() for id in store.ids])
    beside = {name: value for name, value in kept.items() if name not in {*old, "joined"}}
    if {**described, **beside} != kept:
        begin_revision(store, {**described, **beside}, 0)
    return Store(path)


def warn_if_stale(store: Store, dataset: Dataset, most: int = 1000) -> None:
    """Warn if the metadata of a store differ from those of the data in some sampled rows.

    Args:
        store: of the dataset.
        dataset: checked if its metadata are known without reading images.
        most: rows that are compared.
    """
    if not hasattr(dataset, "facts"):
        return
    places, rows = positions_of(dataset), range(0, len(store), -(-len(store) // most) or 1)
    for row in (row for row in rows if store.ids[row] in places):
        now = json.loads(json.dumps(facts_at(dataset, places[store.ids[row]]).describe()))
        if lines := differences(now, store.metadata[row]):
            warnings.warn(
                f"the metadata of {store.path} differ from those of the data now "
                f"({store.ids[row]}: {lines[0]}; 'there' is the store). Update them: `dmin store "
                f"metadata {store.path}`.",
                DminWarning,
                stacklevel=2,
            )
            return


def _require_ids(store: Store, ids: Sequence[str]) -> None:
    lost = sorted(set(store.ids).difference(ids))
    more = sorted(set(ids).difference(store.ids).difference(store.removed_among(ids)))
    if not lost and not more:
        return
    told = [
        f"{len(each):,} {what} ({', '.join(map(repr, each[:3]))}{', …' if each[3:] else ''})"
        for each, what in ((lost, "are in the store alone"), (more, "are in the data alone"))
        if each
    ]
    raise DminError(
        f"The examples of {store.path} and of the data differ: {' and '.join(told)}. First remove "
        f"those only in the store (`dmin store remove`) or collect those only in the data "
        f"(collect.grow=true)."
    )


def _columns(store: Store) -> list[str]:
    """Return the metadata columns that a store depends on."""
    manifest = store.manifest
    if "columns" in manifest.dataset:
        return list(manifest.dataset["columns"]["names"])
    loss = manifest.features.get("loss")
    if isinstance(loss, dict) and loss.get("sizes_from") == "metadata":
        from dmin.models.conditioning import SIZE_COLUMNS  # diffusers takes seconds

        return [name for pair in SIZE_COLUMNS.values() for name in pair]
    return []


def _changed(store: Store, known: Mapping[str, Facts], names: Sequence[str]) -> list[str]:
    """List the values that differ from those of the collection."""
    lines = []
    for id, kept in store.collected_metadata().items():
        if id in known:
            now = known[id].describe()
            lines += [
                f"{id}.{n}: {_said(now, n)!r} here, {_said(kept, n)!r} there"
                for n in names
                if _said(now, n) != _said(kept, n)
            ]
    return [*lines[:3], f"… and {len(lines) - 3} more"] if len(lines) > 3 else lines


def _said(row: Mapping[str, Any], name: str) -> Any:
    """Return a label, caption or column; older stores may keep a column as either."""
    return row.get(name, row.get(f"metadata_{name}"))
