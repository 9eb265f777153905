"""Compare the manifests of two stores: same collection, or comparable features."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import differences
from dmin.store.manifest import Manifest
from dmin.store.reader import Store


def manifest_differences(
    here: Manifest, there: Manifest, counted: bool = True
) -> dict[str, list[str]]:
    """Return how two manifests differ, by what differs; empty if they are of one collection.

    Args:
        here: a command's manifest.
        there: a store's manifest; its earlier revisions are ignored.
        counted: compare the numbers of examples too.
    """

    def asked(each: Manifest) -> dict[str, dict[str, Any]]:
        count = {"num_examples": each.num_examples} if counted else {}
        return {
            "the dataset changed since collection": {"dataset": each.dataset, **count},
            "the features differ": {"features": each.features},
            "the layout differs": {
                "layout": asdict(each.layout),
                "block_size": each.block_size,
            },
        }

    ours, theirs = asked(here), asked(there)
    found = {what: differences(ours[what], theirs[what]) for what in ours}
    return {what: lines for what, lines in found.items() if lines}


def metadata_remedy(here: Manifest, there: Manifest, path: Path) -> str:
    """Return a remedy for data that have grown, or whose metadata changed; empty if neither."""
    same = here.features == there.features and here.layout == there.layout
    if same and here.num_examples > there.num_examples:
        return (
            f" If the data have only grown, `dmin collect {path} collect.grow=true` adds the new"
            f" examples to the store."
        )
    if "schema" in there.dataset or "schema" not in here.dataset:
        return ""
    return (
        " The fingerprint of this older store covers all metadata: if only metadata changed, run "
        f"`dmin store metadata {path} FOLDER` with the folder of the images, which updates the "
        "store."
    )


def check_comparable(query_store: Store, train_store: Store) -> None:
    """Raise DminError unless the features of the two stores are comparable."""
    query, train = query_store.manifest, train_store.manifest
    lines = differences(query.comparable(), train.comparable())
    if lines:
        raise DminError(
            f"The query store {query_store.path} and the training store {train_store.path} cannot"
            f" be compared: {'; '.join(lines)} ('here' is "
            "the query store, 'there' the training store). Collect both with the same model "
            "weights, loss, noise, schedule and sketch."
        )
