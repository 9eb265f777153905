"""A store's writer in a thread of its own: the device goes on while rows are sealed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from dmin.store import Rows, StoreWriter


class Arriving(NamedTuple):
    """The rows of a block that a GPU may still be at."""

    ids: list[str]
    wait: Callable[[], Rows]


class BackgroundWriter:
    """Appends blocks to a store in the order they come, one thread behind the loop.

    At most ``waiting`` blocks are in memory unwritten: then :meth:`append` waits. Whatever failed
    is raised by the next call, and every call but ``append`` returns only when all that was handed
    over before is with the store's writer: what a kill can cost is what it is without the thread.

    Args:
        writer: the store's writer; nobody else may use it meanwhile.
        done: called in the thread when a block has been taken, with the number of its rows.
        waiting: blocks that may wait.
    """

    def __init__(self, writer: StoreWriter, done: Callable[[int], None], waiting: int = 2) -> None:
        self.writer = writer
        self.done = done
        self.waiting = waiting
        self._thread = ThreadPoolExecutor(1, "dmin-writer")
        self._pending: deque[Future[None]] = deque()

    def append(self, block: int, rows: Arriving) -> None:
        """Hand over the rows of one block."""
        self._wait(self.waiting)
        self._pending.append(self._thread.submit(self._append, block, rows))

    def seal(self) -> None:
        """Write what was handed over as a segment."""
        self._wait()
        self.writer.seal()

    def close(self) -> None:
        """Write what was handed over; the store's writer takes no more."""
        try:
            self._wait()
        finally:  # the blocks before a failed one are right
            self.stop()
            self.writer.close()

    def stop(self) -> None:
        """Wait for the thread to end, whatever became of its work."""
        self._thread.shutdown()

    def _append(self, block: int, rows: Arriving) -> None:
        self.writer.append(block, rows.wait())
        self.done(len(rows.ids))

    def _wait(self, most: int = 0) -> None:
        """Wait until so many blocks are left at most, and until none that is done has failed."""
        while self._pending and (len(self._pending) > most or self._pending[0].done()):
            self._pending.popleft().result()
