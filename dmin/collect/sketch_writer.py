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

    At most ``waiting`` unwritten blocks are in memory, then :meth:`append` waits. Errors
    are raised by the next call. Every call except ``append`` returns only after all earlier blocks
    have reached the store's writer, so that a kill loses no more than without the thread.

    Args:
        writer: the store's writer, used exclusively.
        done: called in the thread for each block taken, with the number of its rows.
        waiting: blocks that may wait.
    """

    def __init__(self, writer: StoreWriter, done: Callable[[int], None], waiting: int = 2) -> None:
        self.writer = writer
        self.done = done
        self.waiting = waiting
        self._thread = ThreadPoolExecutor(1, "dmin-writer")
        self._pending: deque[Future[None]] = deque()

    def append(self, block: int, rows: Callable[[], Rows]) -> None:
        """Pass on one block: its number, and a function that waits for its rows."""
        self._wait(self.waiting)
        self._pending.append(self._thread.submit(self._append, block, rows))

    def seal(self) -> None:
        """Write all blocks passed on so far as a segment."""
        self._wait()
        self.writer.seal()

    def close(self) -> None:
        """Write all blocks passed on so far, and close the store's writer."""
        try:
            self._wait()
        finally:  # the blocks before a failed one are right
            self.stop()
            self.writer.close()

    def stop(self) -> None:
        """Wait for the thread to end, ignoring errors."""
        self._thread.shutdown()

    def _append(self, block: int, wait: Callable[[], Rows]) -> None:
        rows = wait()
        self.writer.append(block, rows)
        self.done(len(rows.ids))

    def _wait(self, most: int = 0) -> None:
        """Wait until at most so many blocks are left; raise errors of finished ones."""
        while self._pending and (len(self._pending) > most or self._pending[0].done()):
            self._pending.popleft().result()


class SketchWriter(BasePredictionWriter):
    """Passes each block's rows to the store; finished blocks are sealed however the loop ends.

    Args:
        writer: the background writer.
        stop: signals received so far.
        lockstep: whether the processes share a network, so that none can continue alone.
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
        """Pass one block to the background writer, unless it belongs to another process."""
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
        """After a signal, seal finished blocks, as this one may not finish in time."""
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
        """Seal finished blocks before the exception ends the process."""
        self.writer.close()
