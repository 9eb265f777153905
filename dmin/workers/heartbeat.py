"""Heartbeats: a small status file for each process at work on a store.

::

    store/progress/shard-3-of-64.rank-0-of-2.<run>.json    rewritten every few seconds
    store/progress/shard-3-of-64.rank-0-of-2.jsonl         a line a minute, and at a new state

These files are in no fingerprint and may be lost. By them `dmin status` shows a running
or dead collection, two jobs avoid doing the same work, and every wait for another process is
bounded: a living process changes its file. `dmin.workers.liveness` reads them.
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
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from dmin.runtime.files import append, commit
from dmin.workers.liveness import EVERY, FOLDER, WorkerStatus, born, machine_here, reports
from dmin.workers.shard import Shard

TRIES = 100  # to write into a folder that others make and remove
FOUND_BY_READER = ("share", "age", "ahead", "foreign")  # the first by the file's name
LOG_EVERY = 60.0  # seconds between two lines of the log of a process whose state stays


class Heartbeat:
    """Says how far this process is, by itself every few seconds, until it is left.

    Writing it can fail without harm: the work goes on.

    Args:
        store: the store's folder.
        share: this process's part.
        every: seconds between two heartbeats.
        kept: whether the file stays when it is left, and says how that came.

    Attributes:
        file: of this process and run: no other process writes it.
        gained: whether this run finished anything, so that a next one has less to do.
    """

    def __init__(self, store: Path, share: Shard, every: float = EVERY, kept: bool = True) -> None:
        self.store = store
        self.share = share
        self.gained: bool = False
        self.kept = kept
        pid, run = os.getpid(), secrets.token_hex(8)
        self.file: Path = store / FOLDER / f"{share.name}.{run}.json"
        self._said = WorkerStatus(
            share=share,
            run=run,
            state="starting",
            host=socket.gethostname(),
            pid=pid,
            machine=machine_here(),
            born=born(pid),
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
        while not (found := [r for r in reports(self.store, first.__eq__) if self._of_this_run(r)]):
            if time.monotonic() > end:
                break
            time.sleep(0.5)
        return bool(found)

    def _of_this_run(self, report: WorkerStatus) -> bool:
        return report.run == self.run and not report.foreign

    def say(self, **changes: Any) -> None:
        """Change what it says, and write it now: fields of :class:`WorkerStatus`."""
        with self._lock:
            self._said = replace(self._said, **changes)
        self._write()

    def begin(self, blocks: int) -> None:
        """Say that the first of so many blocks begins."""
        self._recent.clear()
        self._recent.append((time.monotonic(), 0))
        self.say(state="collecting", blocks=blocks)

    def block_done(self, rows: int) -> None:
        """Count a block of so many examples; the first is said at once, others in time."""
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

    def __enter__(self) -> Heartbeat:
        """Begin to write heartbeats."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Say how it ended, and what went wrong if something did."""
        self._left.set()
        self._thread.join()
        if not self.kept:
            self.withdraw()
        elif error is None:
            self.say(state="finished")
        elif isinstance(error, SystemExit | KeyboardInterrupt):
            self.say(state="stopped", note=f"{type(error).__name__} {error}".strip())
        else:
            self.say(state="failed", note=" ".join(str(error).split())[:400])

    def _beat(self) -> None:
        while not self._left.wait(self._said.every):
            self._write()

    def withdraw(self) -> None:
        """Remove the file, and the folders if nothing else is in them."""
        with contextlib.suppress(OSError):
            self.file.unlink(missing_ok=True)
            self.file.parent.rmdir()
            self.store.rmdir()

    def _text(self) -> bytes:
        with self._lock:
            self._said = replace(self._said, beat=self._said.beat + 1, clock=time.time())
            said = asdict(self._said)
        document = {name: value for name, value in said.items() if name not in FOUND_BY_READER}
        return (json.dumps(document, indent=1) + "\n").encode()

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            for _ in range(TRIES):
                # Whoever withdraws removes the folder: a claim that is not written would hold
                # nothing, and its owner would not know.
                with contextlib.suppress(FileNotFoundError):
                    # A store that was deleted meanwhile stays deleted.
                    new = not self.kept or not self._said.beat
                    self.file.parent.mkdir(parents=new, exist_ok=True)
                    commit(self.file, self._text(), durable=False)
                    break
            self._log()

    def _log(self) -> None:
        """Add a line to what is kept of the whole run, if it is time to."""
        said, now = self._said, time.monotonic()
        if not self.kept or said.state == "claiming":
            return
        if said.state == self._logged[0] and now - self._logged[1] < LOG_EVERY:
            return
        self._logged = said.state, now
        kept = ("run", "state", "host", "pid", "blocks", "done", "rows", "rate", "note")
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        line |= {name: getattr(said, name) for name in kept}
        append(self.file.with_name(f"{self.share.name}.jsonl"), json.dumps(line) + "\n")


def batch_job() -> str:
    """Return the number of the job of a batch system that this process belongs to, if to any."""
    get = os.environ.get
    if get("SLURM_ARRAY_JOB_ID"):
        return f"{get('SLURM_ARRAY_JOB_ID')}_{get('SLURM_ARRAY_TASK_ID')}"
    names = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "OAR_JOB_ID")
    return next((get(name, "") for name in names if get(name)), "")
