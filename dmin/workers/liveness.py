"""What the processes at work on a store say of themselves, and which of them still live.

Clocks of different machines are never compared: whether a file changes is seen over time, and its
age is told by the file system that stamps it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
        return self.running or self.alive

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
        named = [(Shard.named(file.name), file) for file in folder.glob("*.json")]
    except OSError:
        return []
    wanted = [(share, file) for share, file in named if share is not None and chosen(share)]
    now = _file_system_clock(folder) if wanted else 0.0
    found = (_read(share, file, now) for share, file in wanted)
    return sorted((each for each in found if each is not None), key=lambda each: each.share)


def remove_ended(store: Path, share: Shard) -> None:
    """Remove what ended or lost runs at a share said, and what cannot be read."""
    folder = store / FOLDER
    with contextlib.suppress(OSError):
        now = _file_system_clock(folder)
        for file in folder.glob(f"{share.name}.*"):
            status = _read(share, file, now)
            if file.suffix == ".json" and not (status is not None and status.at_work):
                file.unlink(missing_ok=True)


class LivenessMonitor:
    """Sees over time which processes still live, by whether their files change.

    Args:
        store: the store's folder.
        run: of which run.
        shares: of its processes.
    """

    def __init__(self, store: Path, run: str, shares: Collection[Shard]) -> None:
        self.store, self.run, self.shares = store, run, set(shares)
        now = time.monotonic()
        self._beats = {share: (-1, now) for share in self.shares}
        self._work = {share: ((-1, ""), now) for share in self.shares}

    def look(self) -> tuple[dict[Shard, WorkerStatus], dict[Shard, str]]:
        """Return what the processes said last, and of those that are lost the reason."""
        now = time.monotonic()
        found = reports(self.store, self.shares.__contains__)
        said = {each.share: each for each in found if each.run == self.run}
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


def _read(share: Shard, file: Path, now: float) -> WorkerStatus | None:
    try:
        written = file.stat().st_mtime
        document: Mapping[str, Any] = json.loads(file.read_text())
        known = {name: document[name] for name in document if name in WorkerStatus.__annotations__}
        report = WorkerStatus(share=share, **known)
        return replace(report, age=max(0.0, now - written), ahead=report.clock - written)
    except (OSError, ValueError, TypeError):
        return None  # just replaced or removed, or of another version


def _file_system_clock(folder: Path) -> float:
    """Return the time by the clock that stamps files in a folder."""
    probe = folder / f"clock.{secrets.token_hex(4)}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()  # not ours to write: the clocks may be apart then
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


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
