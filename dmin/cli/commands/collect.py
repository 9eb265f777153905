"""``dmin collect``: the store of the training examples, or a shard of it."""

from __future__ import annotations

from typing import Any

from dmin.cli.commands.command import Command
from dmin.cli.jobs.requeue import after_stop
from dmin.cli.workspace.workspace import Workspace
from dmin.runtime.progress import titled
from dmin.runtime.signals import Stopped, StopSignals


@Command
def collect(work: Workspace, results: dict[str, Any]) -> None:
    """Collect the gradients of the training examples into a store."""
    with StopSignals() as stop:
        try:
            store = work.collect_train(stop)
        except Stopped as stopped:
            after_stop(stopped, work.cfg.collect.requeue, work.is_main, work.console.print)
            raise
    if not work.is_main:
        return
    if not store.complete:
        from dmin.collect.completion import what_is_missing

        rows, shard = f"{len(store):,} of {store.manifest.num_examples:,}", work.cfg.shard
        results["figures"] = {"rows": rows, "store": store.path.name}
        results.update(store=str(store.path), rows=len(store))
        work.console.print(
            titled(
                "store",
                f": {store.path}\n  shard {shard.id} of {shard.num} is done; "
                f"{what_is_missing(store)}.",
            )
        )
        return
    size = sum(file.stat().st_size for file in store.path.glob("*.h5"))
    raw = 4 * work.collector.attributed.count * store.layout.draws * len(store.layout.timesteps)
    results.update(
        figures={
            "rows": f"{len(store):,}",
            "MiB": f"{size / 2**20:,.1f}",
            "store": store.path.name,
        },
        store=str(store.path),
        rows=len(store),
        bytes=size,
        digest=store.digest(),
        raw_bytes=raw,
    )
    work.console.print(
        titled(
            "store",
            f": {store.path}\n  {len(store):,} rows, {size / 2**20:,.1f} MiB; "
            f"{size / len(store) / 1024:,.1f} KiB an example instead of {raw / 1024:,.0f} KiB "
            f"({raw * len(store) / size:,.0f} times less)"
            f"{_checks(work.collector.checks)}",
        )
    )
    peak = work.collector.peak
    if peak.bytes:  # nothing was collected, or nothing grew
        results["peak"] = {"bytes": peak.bytes, "meaning": peak.meaning}
        work.console.print(f"  {peak.bytes / 2**20:,.1f} MiB {peak.meaning}")


def _checks(seconds: float) -> str:
    """Return what checking cost, if anything was collected."""
    return f"\n  {seconds:,.1f} s of it to check whose gradient is whose" if seconds else ""
