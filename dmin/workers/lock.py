"""The lock: of several processes that want to do the same work one does it, others wait or stop.

A *claim* is a worker's own heartbeat file. A process that wants to work first writes its claim and
then looks for claims of others on the same blocks; it proceeds only if there are none, and
withdraws otherwise. So of two processes that claim at the same time at most one proceeds, on any
nodes. A claim ends when its process releases it, is seen to be dead on its own machine, or, as seen
from other machines, has not updated its file for a long time. A suspended process keeps its claim
on its own machine; others may take over, and when it continues both seal the same blocks, of which
readers use one. Claims of other users are ignored: in a shared folder anyone could write one that
keeps all others from working.

A file lock in this node's temporary folder makes the processes of one machine write and
look one after another. It only shortens the race: without file locks, and between nodes, claims
decide.
"""

import contextlib
import hashlib
import os
import random
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from dmin.runtime.errors import DminError, DminWarning
from dmin.runtime.signals import StopSignals
from dmin.workers.heartbeat import Heartbeat
from dmin.workers.liveness import EVERY, SILENT, WorkerStatus, remove_ended, reports
from dmin.workers.shard import WHOLE, Shard

POLL = 0.5  # seconds between two looks at a rival
REMIND = 60.0  # seconds between two lines that say what is waited for
BRIEF = 5.0  # seconds to wait for the file lock: it is held for a few file operations


class Beats(NamedTuple):
    """A rival's beat when it was first seen and lately, and since when, by this process's clock."""

    first: int
    last: int
    since: float


Seen = dict[str, Beats]  # by the rival's run


@contextlib.contextmanager
def hold(
    path: Path,
    shard: Shard = WHOLE,
    *,
    wait: float,
    on_wait: Callable[[str], None] = lambda line: None,
    stop: StopSignals | None = None,
) -> Iterator[None]:
    """Hold the right to make what stands at a path; wait while another job has it.

    Where nothing can be written there is nothing to hold.

    Args:
        path: what is made: a model, a folder, a store. The claims lie in a hidden folder beside it
            until they end.
        shard: the part that is made; parts that do not overlap are held side by side.
        wait: seconds to wait for others.
        on_wait: told whom it waits for, at once and then every minute.
        stop: signals that end the waiting.

    Raises:
        DminError: the other job was not done in time.
        Stopped: a signal came.
    """
    heartbeat = Heartbeat(path.with_name(f".{path.name}.claims"), shard, kept=False)

    def refusal(rival: WorkerStatus) -> str:
        return (
            f"{path} is being made by another job ({rival.who}, since {rival.started}), and was "
            f"not done after {wait:g} s (collect.wait_seconds). Wait for it and run the same "
            "command again, which reuses all results; or set collect.wait_seconds higher."
        )

    _wait_for_claim(heartbeat, None, wait, refusal, on_wait, stop, f"makes {path}")
    with heartbeat:
        yield


def claim(heartbeat: Heartbeat, blocks: int, wait: float = 0.0) -> None:
    """Take a shard of a store's blocks, or refuse because another process is at some of them.

    Args:
        heartbeat: of this process, with its shard.
        blocks: of the store.
        wait: seconds to let the other process finish.

    Raises:
        DminError: it did not finish in time.
    """

    def refusal(rival: WorkerStatus) -> str:
        return (
            f"{heartbeat.store} is being collected by {rival.who}, which computes {rival.share} "
            f"({rival.done} of {rival.blocks} blocks done) and so some blocks of this command "
            f"({heartbeat.share}). Let it end, or stop it and run this command again; to share the "
            "work, give each job its own part: shard.id=0 … n−1 with shard.num=n."
        )

    _wait_for_claim(heartbeat, blocks, wait, refusal)


def _wait_for_claim(
    mine: Heartbeat,
    blocks: int | None,
    wait: float,
    refusal: Callable[[WorkerStatus], str],
    on_wait: Callable[[str], None] = lambda line: None,
    stop: StopSignals | None = None,
    doing: str = "",
) -> None:
    start = time.monotonic()
    remind = start
    seen: Seen = {}
    while rivals := _claim_once(mine, blocks, seen):
        if stop is not None:
            stop.between_blocks()
        now = time.monotonic()
        # Who only claims may yet withdraw: no reason to give up.
        rivals = [each for each in rivals if each.state != "claiming"]
        lively = [r for r in rivals if r.alive or r.beat != seen[r.run].first]
        if lively and now >= start + wait:
            raise DminError(refusal(lively[0]))
        if lively and now >= remind:
            on_wait(f"waiting for another job ({lively[0].who}) that {doing}")
            remind = now + REMIND
        left = start + wait - now
        time.sleep(random.uniform(0.5, 1) * (min(POLL, left) if left > 0 else POLL))


def _claim_once(mine: Heartbeat, blocks: int | None, seen: Seen) -> list[WorkerStatus]:
    """Claim, unless others are in the way: return them."""
    with _file_lock(mine.store):
        if rivals := _rivals(mine, blocks, seen):
            return rivals
        mine.say(state="claiming")
        end = time.monotonic() + BRIEF
        while rivals := _rivals(mine, blocks, seen):
            # Of several that wrote at once the first by name waits for the others to withdraw.
            others = [r for r in rivals if r.state != "claiming" or r.run < mine.run]
            if others or time.monotonic() > end:
                mine.withdraw()
                return rivals
            time.sleep(POLL / 10)
        mine.say(state="starting")
        remove_ended(mine.store, mine.share)
        return []


def _rivals(mine: Heartbeat, blocks: int | None, seen: Seen) -> list[WorkerStatus]:
    """Return the workers of other runs whose claims overlap this one's, as far as they hold.

    A claim whose beat stays the same for long holds nothing, whatever its file says of its age.
    """

    def overlaps(share: Shard) -> bool:
        return share.overlaps(mine.share, blocks or share.shards * mine.share.shards)

    now, found = time.monotonic(), []
    for each in reports(mine.store, overlaps):
        if each.foreign and each.running and each.run not in seen:
            seen[each.run] = Beats(each.beat, each.beat, now)
            warnings.warn(
                f"{each.who}, of another user, is working on {mine.store} too. It is not waited "
                f"for; blocks that both write count once.",
                DminWarning,
                stacklevel=2,
            )
        if each.run == mine.run or not each.at_work:
            continue
        known = seen.get(each.run, Beats(each.beat, each.beat, now))
        if each.beat != known.last:
            known = known._replace(last=each.beat, since=now)
        seen[each.run] = known
        if each.alive or now - known.since <= SILENT * EVERY:
            found.append(each)
    return found


@contextlib.contextmanager
def _file_lock(folder: Path) -> Iterator[None]:
    """Have the processes of this machine look at a folder's claims in turn, where that can be."""
    lock = None
    with contextlib.suppress(OSError, NotImplementedError):  # a time-out is an OSError too
        lock = FileLock(_lock_file(folder))
        lock.acquire(timeout=BRIEF)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError, NotImplementedError):
                lock.release()


def _lock_file(folder: Path) -> Path:
    """Return this node's file for a folder: locks on network file systems may hang or be lost."""
    mine = os.getuid() if hasattr(os, "getuid") else 0  # Windows has a folder of its own for each
    place = Path(tempfile.gettempdir()) / f"dmin-{mine}"
    place.mkdir(mode=0o700, exist_ok=True)
    state = place.lstat()
    if state.st_uid != mine or not stat.S_ISDIR(state.st_mode):
        raise PermissionError(
            f"{place} belongs to another user"
        )  # who could hold the lock for ever
    return place / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.lock"
