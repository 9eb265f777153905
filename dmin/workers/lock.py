"""Jobs that want the same thing made: one makes it, the others wait and find it done."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from dmin.runtime.errors import DminError
from dmin.runtime.signals import StopSignals

EVERY = 60.0  # seconds between two lines that say what is waited for
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NOT_WRITABLE = {errno.EACCES, errno.EROFS, errno.EPERM}


@contextmanager
def hold(
    path: Path,
    limit: float,
    tell: Callable[[str], None],
    *,
    shared: bool = False,
    stop: StopSignals | None = None,
    poll: float = 0.5,
) -> Iterator[None]:
    """Hold the right to make what stands at a path; wait while another job has it.

    The lock ends with its process, however that ends. On a file system without locks, and where
    nothing can be written, there is nothing to hold: several jobs may then do the same work.

    Args:
        path: what is made; the lock is a hidden file beside it.
        limit: seconds to wait.
        tell: told whom it waits for, at once and then every minute.
        shared: with others who say so too (the shards of one store), not with those who do not.
        stop: signals that end the waiting.
        poll: seconds between two tries.

    Raises:
        DminError: the other one was not done in time.
    """
    file = path.parent / f".{path.name}.lock"
    patience = _Patience(path, file, limit, tell)
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while (lock := _opened(file)) is not None:
        with lock:
            held = _try(lock, mode)
            if held and not _is(lock, file):
                continue  # the one before took the file away while this one opened it
            if held is False:
                if stop is not None:
                    stop.between_blocks()
                patience.wait(poll)
                continue
            if held and not shared:
                _sign(lock)
            try:
                yield
            finally:
                if held and not shared:
                    file.unlink(missing_ok=True)
            return
    yield


def _opened(file: Path) -> TextIO | None:
    """Open the lock file; None where nothing can be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return file.open("a+")
    except OSError as error:
        if error.errno in _NOT_WRITABLE:
            return None
        raise


def _try(lock: TextIO, mode: int) -> bool | None:
    """Return whether the lock was had; None where the file system has no locks."""
    try:
        fcntl.flock(lock, mode | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def _is(lock: TextIO, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:
        return False


class _Patience:
    """Waiting that says what for, and ends."""

    def __init__(self, path: Path, file: Path, limit: float, tell: Callable[[str], None]) -> None:
        self.path, self.file, self.limit, self.tell = path, file, limit, tell
        self.start = time.monotonic()
        self.said = float("-inf")

    def wait(self, seconds: float) -> None:
        """Wait a little, unless the limit is reached."""
        now = time.monotonic()
        if now - self.start >= self.limit:
            raise DminError(
                f"{self.path} is being made by another job ({_holder(self.file)}), and was not "
                f"done after {self.limit:g} s (collect.wait_seconds). Wait for it and run the same "
                f"command again: what is finished is found and not done again. Or set "
                f"collect.wait_seconds higher."
            )
        if now - self.said >= EVERY:
            self.tell(f"waiting for another job ({_holder(self.file)}) that makes {self.path}")
            self.said = now
        time.sleep(min(seconds, max(0.0, self.start + self.limit - now)))


def _sign(lock: TextIO) -> None:
    """Say in the lock file who holds it, for those who wait."""
    who = {
        "host": os.uname().nodename,
        "process": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    lock.truncate(0)
    lock.write(json.dumps(who))
    lock.flush()


def _holder(file: Path) -> str:
    try:
        who = json.loads(file.read_text())
        return f"process {who['process']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which one is not known"
