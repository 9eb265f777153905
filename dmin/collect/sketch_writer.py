"""Write rows to the store in a thread of its own, while the device goes on computing."""

import signal
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lightning
from lightning.pytorch.callbacks import BasePredictionWriter

from dmin.runtime.signals import StopSignals
from dmin.store import Rows, StoreWriter


class BackgroundWriter:
    """Appends blocks to a store in the order they come, one thread behind the loop.

    At most ``waiting`` blocks are in memory unwritten: then :meth:`append` waits. Whatever failed
    is raised by the next call, and every call but ``append`` returns only when all that was handed
    over before is with the store's writer: a kill costs no more than it would without the thread.

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

    def append(self, block: int, rows: Callable[[], Rows]) -> None:
        """Hand over one block: its number, and what waits for its rows, which a GPU may be at."""
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

    def _append(self, block: int, wait: Callable[[], Rows]) -> None:
        rows = wait()
        self.writer.append(block, rows)
        self.done(len(rows.ids))

    def _wait(self, most: int = 0) -> None:
        """Wait until so many blocks are left at most, and until none that is done has failed."""
        while self._pending and (len(self._pending) > most or self._pending[0].done()):
            self._pending.popleft().result()


class SketchWriter(BasePredictionWriter):
    """Hands each block's rows to the store; whatever ends the loop, finished blocks are sealed.

    Args:
        writer: behind the loop.
        stop: signals so far.
        lockstep: whether the processes share a network, so that none can go on alone.
    """

    def __init__(self, writer: BackgroundWriter, stop: StopSignals, lockstep: bool) -> None:
        super().__init__("batch")
        self.writer = writer
        self.stop = stop
        self.lockstep = lockstep

    def write_on_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        prediction: tuple[int, Callable[[], Rows] | None],
        *_: Any,
    ) -> None:
        """Hand one block to the store's writer behind the loop, unless it is another process's."""
        block, rows = prediction
        if rows is not None:
            self.writer.append(block, rows)
        if self.lockstep:  # whoever goes on alone would wait for the others' weights
            stops = trainer.strategy.reduce_boolean_decision(bool(self.stop.received), all=False)
            if not stops:
                return  # a signal that came since is told to the others after the next block
            if not self.stop.received:
                self.stop.received.append(signal.SIGTERM)
        self.stop.between_blocks()

    def between_passes(self) -> None:
        """Once a signal came, seal what is finished: this block may not be, in the time left."""
        if self.stop.received and not self.lockstep:
            self.writer.seal()
            self.stop.between_passes()

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Seal the last blocks.

        Not at the end of prediction, which a process without any block never reaches.
        """
        self.writer.close()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Seal what is finished before the exception ends the process."""
        self.writer.close()
