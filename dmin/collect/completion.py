"""The end of a collection by several processes: all exit together, and none waits forever.

No collective operation is used: a dead process would make it hang, and a slow one would make
it time out. Processes watch each other's heartbeats instead (`dmin.workers.liveness`).
"""

import time
from pathlib import Path

from dmin.runtime.errors import DminError
from dmin.runtime.formatting import spans
from dmin.runtime.signals import StopSignals
from dmin.store import Store
from dmin.workers.heartbeat import Heartbeat
from dmin.workers.liveness import LivenessMonitor, WorkerStatus, reports
from dmin.workers.shard import Shard

DONE = ("waiting", "finished")  # all blocks sealed


def wait_for_others(
    progress: Heartbeat, stop: StopSignals | None = None, limit: float = float("inf")
) -> dict[Shard, str]:
    """Wait until the other processes of the job have ended, or are lost.

    The first waits for all others, these wait for the first.

    Args:
        progress: of this process, whose blocks are sealed.
        stop: may end the waiting.
        limit: seconds to wait, also for running processes.

    Returns:
        The fate of those that did not finish, by their shares.

    Raises:
        Stopped: a signal came.
    """
    first, *others = progress.share.job
    awaited = others if progress.share.is_first else [first]
    end = time.monotonic() + limit
    watch = LivenessMonitor(progress.store, progress.run, awaited)
    while True:
        said, lost = watch.look()
        ended = {share for share, report in said.items() if report.ended}
        if progress.share.is_first:
            ended.update(share for share, report in said.items() if report.state == "waiting")
        if ended.union(lost) >= set(awaited) or time.monotonic() > end:
            break
        if stop is not None:
            stop.between_blocks()
        time.sleep(max(0.2, len(awaited) / 100))
    told = {share: _end_of(said[share]) for share in ended if said[share].state not in DONE}
    return {**told, **lost}


def finished(path: Path, share: Shard, lost: dict[Shard, str]) -> Store:
    """Return the store once the blocks of a shard are there.

    The process that finds all of it finished verifies it, so every byte is read once, not by every
    process.

    Args:
        path: the store.
        share: of this process.
        lost: the fate of the processes that did not finish.

    Raises:
        DminError: blocks of the shard are missing, or the store is damaged.
    """
    store = Store(path, verify=False)
    missing = share.pending(store.missing_blocks, store.manifest.num_blocks)
    if missing:
        why = [f"{who}: {what}" for who, what in sorted(lost.items())]
        raise DminError(
            f"The store {path} lacks {len(missing)} blocks of {share_of(share)} (numbers "
            f"{spans(missing)}). {'; '.join(why) or 'A process ended before its blocks'}. Sealed "
            f"blocks are kept: run the same command again, it computes only the missing ones."
        )
    return Store(path) if store.complete and share.is_first else store


def share_of(share: Shard) -> str:
    """Describe the share of a job."""
    return f"shard {share.shard} of {share.shards}" if share.shards > 1 else "the dataset"


def what_is_missing(store: Store) -> str:
    """List the missing shards of an incomplete store, and the processes working on them."""
    manifest = store.manifest
    seen: dict[tuple[int, int], list[WorkerStatus]] = {}
    for report in reports(store.path):
        seen.setdefault((report.share.shards, report.share.shard), []).append(report)
    cut = max((shards for shards, _ in seen), default=1)
    missing = set(store.missing_blocks)
    lines = []
    for shard in range(cut):
        lacks = missing.intersection(Shard(shard, cut).range(manifest.num_blocks))
        if lacks:
            states = sorted({_state(each) for each in seen.get((cut, shard), [])})
            lines.append((shard, ", ".join(states) or "never started here"))
    grouped: dict[str, list[int]] = {}
    for shard, state in lines:
        grouped.setdefault(state, []).append(shard)
    told = "; ".join(f"{spans(shards)} ({state})" for state, shards in grouped.items())
    return f"{len(missing)} of {manifest.num_blocks} blocks are missing; shards of {cut}: {told}"


def _state(report: WorkerStatus) -> str:
    return report.state if report.running or report.ended else "killed"


def _end_of(report: WorkerStatus) -> str:
    note = f": {report.note}" if report.note else ""
    return f"{report.who} {report.state}{note}"
