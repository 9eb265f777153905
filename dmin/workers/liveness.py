"""The status of the processes at work on a store, and which of them are alive.

Clocks of different machines are never compared: a file is observed for changes, and its age
is computed from time stamps of the same file system.

The store's folder may be shared, so these files may come from anyone: files that are not a valid
status are ignored, and those of another user are shown but do not block anything.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from dmin.runtime.files import read_regular
from dmin.workers.shard import Shard

FOLDER = "progress"
EVERY = 10.0  # seconds between two heartbeats
# Without a heartbeat for so many times EVERY a process counts as dead: network file systems may
# show a change a minute late.
SILENT = 9
# Without a finished block for so long a living process counts as stuck, if its blocks are not
# themselves slow.
STUCK_SECONDS, STUCK_BLOCKS = 3600.0, 20
ENDED = ("finished", "stopped", "failed")
MOST_FILES = 20_000  # looked at: others may put any number there
MOST_BYTES, MOST_LETTERS, LARGEST = 1 << 16, 4096, 10**15  # of a file, and of what stands in it


@dataclass(frozen=True)
class WorkerStatus:
    """What a process says of itself.

    Args:
        share: its part of the work.
        run: names the run of its job, the same for all its ranks.
        state: claiming, starting, encoding, collecting, waiting; at its end finished, stopped or
            failed.
        host: name of its machine.
        pid: its process number there.
        machine: names the running system in which the number is unique; empty if unknown.
        born: when that process was started, by that system; tells numbers used again apart.
        job: number of its job in a batch system; empty outside of one.
        started: its own clock when it began, ISO 8601.
        clock: its own clock when it wrote this, seconds since 1970.
        every: seconds between its heartbeats.
        beat: counts them.
        blocks: blocks it has to do in this run.
        done: blocks done in this run.
        rows: examples done in this run.
        rate: examples a second, lately.
        block_seconds: what its last block took.
        note: what went wrong.
        age: seconds since the file was written, by the file system's clock.
        ahead: seconds by which its clock is ahead of the file system's.
        foreign: whether another user wrote it.
    """

    share: Shard
    run: str
    state: str
    host: str
    pid: int
    machine: str
    born: str
    job: str
    started: str
    clock: float
    every: float
    beat: int = 0
    blocks: int = 0
    done: int = 0
    rows: int = 0
    rate: float = 0.0
    block_seconds: float = 0.0
    note: str = ""
    age: float = 0.0
    ahead: float = 0.0
    foreign: bool = False

    @property
    def ended(self) -> bool:
        """Whether it said itself that it is done, one way or the other."""
        return self.state in ENDED

    @property
    def dead(self) -> bool:
        """Whether it is certainly gone without having said so: seen from its own machine."""
        here = self.machine == machine_here() != ""
        return not self.ended and here and born(self.pid) != self.born

    @property
    def alive(self) -> bool:
        """Whether it is certainly there: seen from its own machine."""
        here = self.machine == machine_here() != ""
        return not self.ended and here and born(self.pid) == self.born != ""

    @property
    def silent(self) -> bool:
        """Whether its last heartbeat is too long ago, by the file system's clock."""
        return self.age > SILENT * self.every

    @property
    def running(self) -> bool:
        """Whether it is at work, as far as one look can tell."""
        return not (self.ended or self.dead or self.silent)

    @property
    def at_work(self) -> bool:
        """Whether its work is still its own: alive but silent, it is suspended and may go on."""
        return not self.foreign and (self.running or self.alive)

    @property
    def who(self) -> str:
        """Name the process for people."""
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"


def reports(
    store: Path, chosen: Callable[[Shard], bool] = lambda share: True
) -> list[WorkerStatus]:
    """Return what processes say of themselves, in order of their shares.

    Args:
        store: the store's folder.
        chosen: which shares to read.
    """
    folder = store / FOLDER
    try:
        files = itertools.islice(folder.glob("*.json"), MOST_FILES)
        named = [(Shard.named(file.name), file) for file in files]
    except OSError:
        return []
    wanted = [(share, file) for share, file in named if share is not None and chosen(share)]
    here = _look(folder) if wanted else _Look(0.0, None)
    found = (_read(share, file, here) for share, file in wanted)
    return sorted((each for each in found if each is not None), key=lambda each: each.share)


def remove_ended(store: Path, share: Shard) -> None:
    """Remove what ended or lost runs at a share said, and what cannot be read."""
    folder = store / FOLDER
    here = _look(folder)
    for file in folder.glob(f"{share.name}.*.json"):
        with contextlib.suppress(OSError):
            # One that cannot be read may be on its way: what is just written is let be.
            recent = time.time() - file.stat().st_mtime < SILENT * EVERY
            status = _read(share, file, here)
            ended = not recent if status is None else not (status.at_work or status.foreign)
            if ended:
                file.unlink(missing_ok=True)


class LivenessMonitor:
    """Sees over time which processes still live, by whether their files change.

    Args:
        store: the store's folder.
        run: of which run.
        shares: of its processes.
    """

    def __init__(self, store: Path, run: str, shares: Collection[Shard]) -> None:
        self.store = store
        self.run = run
        self.shares: set[Shard] = set(shares)
        now = time.monotonic()
        self._beats = {share: (-1, now) for share in self.shares}
        self._work = {share: ((-1, ""), now) for share in self.shares}

    def look(self) -> tuple[dict[Shard, WorkerStatus], dict[Shard, str]]:
        """Return what the processes said last, and of those that are lost the reason."""
        now = time.monotonic()
        found = reports(self.store, self.shares.__contains__)
        said = {each.share: each for each in found if each.run == self.run and not each.foreign}
        lost = {}
        for share in self.shares:
            report = said.get(share)
            if report is None:
                if now - self._beats[share][1] > SILENT * EVERY:
                    lost[share] = "never gave a heartbeat here: does it see this folder?"
                continue
            if report.beat != self._beats[share][0]:
                self._beats[share] = report.beat, now
            if (report.done, report.state) != self._work[share][0]:
                self._work[share] = (report.done, report.state), now
            quiet, idle = now - self._beats[share][1], now - self._work[share][1]
            stuck = max(STUCK_SECONDS, STUCK_BLOCKS * report.block_seconds)
            if report.ended:
                continue
            if report.dead:
                lost[share] = f"{report.who} was killed"
            elif quiet > SILENT * report.every:
                lost[share] = f"{report.who} has given no heartbeat for {quiet:.0f} s"
            elif idle > stuck:
                lost[share] = f"{report.who} has finished no block for {idle:.0f} s"
        return said, lost


class _Look(NamedTuple):
    """A folder's own clock at a look into it, and whose files are ours; None if unknown."""

    now: float
    user: int | None


def _look(folder: Path) -> _Look:
    probe = folder / f"clock.{secrets.token_hex(8)}.tmp"
    try:
        probe.touch(exist_ok=False)
        state = probe.stat()
        return _Look(state.st_mtime, state.st_uid)
    except OSError:
        return _Look(time.time(), None)  # not ours to write: the clocks may be apart then
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _read(share: Shard, file: Path, here: _Look) -> WorkerStatus | None:
    """Return what a file says; None if it is no status: damaged, another thing, just replaced."""
    try:
        state, document = file.lstat(), json.loads(read_regular(file, MOST_BYTES))
        said = {f.name: document[f.name] for f in fields(WorkerStatus) if f.name in document}
        kinds = WorkerStatus.__annotations__
        whole = all(_fits(value, kinds[name]) for name, value in said.items())
        if not whole or stat.S_ISLNK(state.st_mode):  # a link could lead to a worker elsewhere
            return None
        report = WorkerStatus(share=share, **said)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return replace(
        report,
        every=min(report.every, EVERY),
        age=abs(here.now - state.st_mtime),  # what is from the future was not written just now
        ahead=report.clock - state.st_mtime,
        foreign=here.user not in (None, state.st_uid),
    )


def _fits(value: Any, kind: str) -> bool:
    if kind == "str":
        return isinstance(value, str) and len(value) <= MOST_LETTERS
    kinds = {"int": (int,), "float": (int, float)}.get(kind, ())
    return type(value) in kinds and 0 <= value <= LARGEST


def machine_here() -> str:
    """Name the running system in which process numbers are unique; empty if it does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def born(pid: int) -> str:
    """Return when a process of this machine was started, in ticks; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
