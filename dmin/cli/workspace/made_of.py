"""The inputs of a run: digests of data, weights and queries, for its record."""

from collections.abc import Container
from typing import Any

from dmin.cli.workspace.built import build_queries
from dmin.cli.workspace.workspace import Workspace


def note_data(work: Workspace) -> None:
    """Record the training examples of a command that writes no store."""
    from dmin.collect.described import describe

    work.made_of["data"] = describe(work.data)


def note_queries(work: Workspace, source: Any) -> None:
    """Record queries that were neither generated nor made from training examples."""
    from dmin.collect.described import describe
    from dmin.queries import Generated, Planted

    if not isinstance(source, Generated | Planted):
        work.made_of["queries"] = describe(source)
        if getattr(source, "against", None) is not None:
            work.made_of["against"] = describe(source.others)


def made_now(work: Workspace, parts: Container[str]) -> dict[str, Any]:
    """Return the current digests of the inputs that a run recorded."""
    if "queries" in parts:
        note_queries(work, build_queries(work.cfg.queries))
    if "weights" in parts:
        _ = work.train_manifest
    elif "data" in parts:
        note_data(work)
    return work.made_of
