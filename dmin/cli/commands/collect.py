"""``dmin collect``: the store of the training examples, or a shard of it."""

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
    rows, figures = f"{len(store):,}", {"rows": "", "MiB": "", "store": store.path.name}
    results.update(store=str(store.path), rows=len(store), figures=figures)
    if not store.complete:
        from dmin.collect.completion import what_is_missing

        shard = work.cfg.shard
        figures["rows"] = f"{rows} of {store.manifest.num_examples:,}"
        del figures["MiB"]
        told = f"shard {shard.id} of {shard.num} is done; {what_is_missing(store)}."
        work.console.print(titled("store", f": {store.path}\n  {told}"))
        return
    size = sum(file.stat().st_size for file in store.path.glob("*.h5"))
    raw = 4 * work.collector.attributed.count * store.layout.draws * len(store.layout.timesteps)
    figures |= {"rows": rows, "MiB": f"{size / 2**20:,.1f}"}
    results.update(bytes=size, digest=store.digest(), raw_bytes=raw)
    told = (
        f"{rows} rows, {figures['MiB']} MiB; "
        f"{size / len(store) / 1024:,.1f} KiB per example instead of {raw / 1024:,.0f} KiB of "
        f"gradients ({raw * len(store) / size:,.0f} times less)"
    )
    if seconds := work.collector.checks:  # zero if nothing was collected
        told += f"\n  {seconds:,.1f} s to check which example each gradient belongs to"
    work.console.print(titled("store", f": {store.path}\n  {told}"))
    peak = work.collector.peak
    if peak.bytes:  # zero if nothing was collected, or memory did not grow
        results["peak"] = {"bytes": peak.bytes, "meaning": peak.meaning}
        work.console.print(f"  {peak.bytes / 2**20:,.1f} MiB {peak.meaning}")
