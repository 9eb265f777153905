"""Who works on a store, and how far they are: a small file a process, apart from the store's bits.

::

    store/progress/shard-3-of-64.rank-0-of-2.json     written anew every few seconds
    store/progress/shard-3-of-64.rank-0-of-2.jsonl    a line a minute, and when the state changes

These files take no part in fingerprints, and nothing is lost with them. They let `dmin status` tell
of a running or dead collection, keep two jobs from doing the same, and bound every wait for another
process: who is alive changes its file. Clocks of different machines are never compared: whether a
file changes is seen over time, and its age is told by the file system that stamps it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from dmin.errors import DminError
from dmin.store.segments import commit
from dmin.store.share import Share

FOLDER = "progress"
EVERY = 10.0  # seconds between two signs of life
LOG_EVERY = 60.0  # seconds between two lines of the log of a process whose state stays
# Without a sign for so many times EVERY a process counts as dead: network file systems may show a
# change a minute late.
SILENT = 9
# Without a finished block for so long a living process counts as stuck, if its blocks are not
# themselves slow.
STUCK_SECONDS, STUCK_BLOCKS = 3600.0, 20
ENDED = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Report:
    """What a process says of itself.

    Args:
        share: its part of the work.
        run: names the run of its job, the same for all its ranks.
        state: starting, encoding, collecting, waiting; at its end finished, stopped or failed.
        host: name of its machine.
        pid: its process number there.
        machine: names the running system in which the number is unique; empty if unknown.
        born: when that process was started, by that system; tells numbers used again apart.
        job: number of its job in a batch system; empty outside of one.
        started: its own clock when it began, ISO 8601.
        clock: its own clock when it wrote this, seconds since 1970.
        every: seconds between its signs of life.
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

    share: Share
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
        here = self.machine == _machine() != ""
        return not self.ended and here and _born(self.pid) != self.born

    @property
    def alive(self) -> bool:
        """Whether it is certainly there: seen from its own machine."""
        here = self.machine == _machine() != ""
        return not self.ended and here and _born(self.pid) == self.born != ""

    @property
    def silent(self) -> bool:
        """Whether its last sign of life is too long ago, by the file system's clock."""
        return self.age > SILENT * self.every

    @property
    def running(self) -> bool:
        """Whether it is at work, as far as one look can tell."""
        return not (self.ended or self.dead or self.silent)

    @property
    def who(self) -> str:
        """Name the process for people."""
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"


class Progress:
    """Tells others how far this process is, by itself every few seconds, until it is left.

    Writing it can fail without harm: the work goes on.

    Args:
        store: the store's folder.
        share: this process's part.
        every: seconds between signs of life.

    Attributes:
        gained: whether this run finished anything, so that a next one has less to do.
    """

    def __init__(self, store: Path, share: Share, every: float = EVERY) -> None:
        self.store = store
        self.share = share
        self.gained = False
        pid = os.getpid()
        self._said = Report(
            share=share,
            run=secrets.token_hex(8),
            state="starting",
            host=socket.gethostname(),
            pid=pid,
            machine=_machine(),
            born=_born(pid),
            job=batch_job(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            clock=0.0,
            every=every,
        )
        self._logged = ("", 0.0)  # state and time of the last line in the log
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._recent: deque[tuple[float, int]] = deque(maxlen=16)  # end and rows of each block
        self._thread = threading.Thread(target=self._beat, name="dmin-progress", daemon=True)

    @property
    def run(self) -> str:
        """What names this run of the job."""
        return self._said.run

    def claim(self, units: int, wait: float = 0.0) -> None:
        """Take the share; wait a little where it is not plain whether another process has it.

        Args:
            units: blocks of the store.
            wait: seconds to let another process finish that is at work on blocks of this share.

        Raises:
            DminError: one is, and did not finish in time.
        """
        if self._rivals(units) or not self._created():
            self._outwait(units, wait)
            self._write()

    def joins(self, run: str) -> None:
        """Say that this process is a rank of a run that another one named."""
        self.say(run=run)

    def sees_first(self, limit: float = 45.0) -> bool:
        """Say whether the first process of this run shows in the store, as seen from here.

        Args:
            limit: seconds to wait for it: a network file system may be that late.
        """
        first = self.share.job[0]
        end = time.monotonic() + limit
        while not (found := [r for r in reports(self.store, first.__eq__) if r.run == self.run]):
            if time.monotonic() > end:
                break
            time.sleep(0.5)
        return bool(found)

    def say(self, **changes: Any) -> None:
        """Change what is told, and tell it now: fields of :class:`Report`."""
        with self._lock:
            self._said = replace(self._said, **changes)
        self._write()

    def begin(self, blocks: int) -> None:
        """Say that the first of so many blocks begins."""
        self._recent.clear()
        self._recent.append((time.monotonic(), 0))
        self.say(state="collecting", blocks=blocks)

    def block_done(self, rows: int) -> None:
        """Count a block of so many examples; the first is told at once, others in time."""
        now = time.monotonic()
        took = now - self._recent[-1][0] if self._recent else 0.0
        self._recent.append((now, rows))
        self.gained = True
        seconds = now - self._recent[0][0]
        lately = sum(count for _, count in list(self._recent)[1:])
        with self._lock:
            said = self._said
            self._said = replace(
                said,
                done=said.done + 1,
                rows=said.rows + rows,
                rate=lately / seconds if seconds > 0 else 0.0,
                block_seconds=took,
            )
        if said.done == 0:
            self._write()

    def __enter__(self) -> Progress:
        """Begin to give signs of life."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tell the end, and what went wrong if something did."""
        self._left.set()
        self._thread.join()
        if error is None:
            self.say(state="finished")
        elif isinstance(error, SystemExit | KeyboardInterrupt):
            self.say(state="stopped", note=f"{type(error).__name__} {error}".strip())
        else:
            self.say(state="failed", note=" ".join(str(error).split())[:400])

    def _beat(self) -> None:
        while not self._left.wait(self._said.every):
            self._write()

    def _created(self) -> bool:
        """Write the file if there is none; of several processes at once one does."""
        try:
            self._path.parent.mkdir(exist_ok=True)
            commit(self._path, self._text(), overwrite=False)
        except FileExistsError:
            return False
        except OSError:
            self._write()  # a file system without links
        return True

    def _outwait(self, units: int, wait: float) -> None:
        rivals = self._rivals(units)
        seen = {each.share: each.beat for each in rivals}
        start = time.monotonic()
        silence = max((SILENT * each.every for each in rivals), default=0)
        while rivals and time.monotonic() < start + max(silence, wait):
            alive = [each for each in rivals if each.alive or each.beat != seen.get(each.share)]
            if alive and time.monotonic() >= start + wait:
                raise DminError(
                    f"{self.store} is being collected by {alive[0].who}, which does "
                    f"{alive[0].share} ({alive[0].done} of {alive[0].blocks} blocks done) and with "
                    f"it blocks that this command ({self.share}) would do again. Let it end, or "
                    f"stop it and give this command again. To share the work give every job a "
                    f"part of its own: shard.id=0 … n−1 with shard.num=n."
                )
            time.sleep(min(1.0, max(0.1, EVERY / 10)))
            rivals = self._rivals(units)

    def _rivals(self, units: int) -> list[Report]:
        others = reports(self.store, lambda share: share.overlaps(self.share, units))
        return [each for each in others if each.running and each.run != self.run]

    @property
    def _path(self) -> Path:
        return self.store / FOLDER / f"{self.share.name}.json"

    def _text(self) -> bytes:
        with self._lock:
            self._said = replace(self._said, beat=self._said.beat + 1, clock=time.time())
            document = asdict(self._said)
        for name in ("share", "age", "ahead"):  # in the file's name; for the reader to find
            del document[name]
        return (json.dumps(document, indent=1) + "\n").encode()

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            temporary = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}.tmp")
            try:
                temporary.write_bytes(self._text())
                temporary.replace(self._path)
            finally:
                temporary.unlink(missing_ok=True)
            self._log()

    def _log(self) -> None:
        """Add a line to what is kept of the whole run, if it is time to."""
        said, now = self._said, time.monotonic()
        if said.state == self._logged[0] and now - self._logged[1] < LOG_EVERY:
            return
        self._logged = said.state, now
        kept = ("run", "state", "host", "pid", "blocks", "done", "rows", "rate", "note")
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        line |= {name: getattr(said, name) for name in kept}
        with self._path.with_suffix(".jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def reports(store: Path, chosen: Callable[[Share], bool] = lambda share: True) -> list[Report]:
    """Return what processes say of themselves, in order of their shares.

    Args:
        store: the store's folder.
        chosen: which shares to read.
    """
    folder = store / FOLDER
    try:
        named = [(Share.named(file.stem), file) for file in folder.glob("*.json")]
    except OSError:
        return []
    wanted = [(share, file) for share, file in named if share is not None and chosen(share)]
    now = _file_system_clock(folder) if wanted else 0.0
    found = (_read(share, file, now) for share, file in wanted)
    return sorted((each for each in found if each is not None), key=lambda each: each.share)


class Watch:
    """Sees over time which processes still live, by whether their files change.

    Args:
        store: the store's folder.
        run: of which run.
        shares: of its processes.
    """

    def __init__(self, store: Path, run: str, shares: Collection[Share]) -> None:
        self.store, self.run, self.shares = store, run, set(shares)
        now = time.monotonic()
        self._beats = {share: (-1, now) for share in self.shares}
        self._work = {share: ((-1, ""), now) for share in self.shares}

    def look(self) -> tuple[dict[Share, Report], dict[Share, str]]:
        """Return what the processes said last, and of those that are lost the reason."""
        now = time.monotonic()
        found = reports(self.store, self.shares.__contains__)
        said = {each.share: each for each in found if each.run == self.run}
        lost = {}
        for share in self.shares:
            report = said.get(share)
            if report is None:
                if now - self._beats[share][1] > SILENT * EVERY:
                    lost[share] = "never gave a sign of life here: does it see this folder?"
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
                lost[share] = f"{report.who} has given no sign of life for {quiet:.0f} s"
            elif idle > stuck:
                lost[share] = f"{report.who} has finished no block for {idle:.0f} s"
        return said, lost


def batch_job() -> str:
    """Return the number of the job of a batch system that this process belongs to, if to any."""
    get = os.environ.get
    if get("SLURM_ARRAY_JOB_ID"):
        return f"{get('SLURM_ARRAY_JOB_ID')}_{get('SLURM_ARRAY_TASK_ID')}"
    names = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "OAR_JOB_ID")
    return next((get(name, "") for name in names if get(name)), "")


def _read(share: Share, file: Path, now: float) -> Report | None:
    try:
        written = file.stat().st_mtime
        document: Mapping[str, Any] = json.loads(file.read_text())
        known = {name: document[name] for name in document if name in Report.__annotations__}
        report = Report(share=share, **known)
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


def _machine() -> str:
    """Name the running system in which process numbers are unique; empty if it does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """Return when a process of this machine was started, in ticks; empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
