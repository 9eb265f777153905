"""Termination signals: recorded when they arrive, obeyed between two blocks."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# SIGTERM: a cancelled or preempted job. SIGHUP: the terminal was closed or the connection lost.
# SIGUSR1 and SIGUSR2: what SLURM is asked to send some time before the walltime is up
# (`sbatch --signal`; submitit takes the second). Windows has the first alone.
_NAMES = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

# A signal so soon after another is the same request, delivered by two ways.
SECONDS_OF_ONE_REQUEST = 3.0


class Stopped(SystemExit):
    """The work ended early because a signal asked for it; what was finished is sealed.

    Args:
        signum: the signal.
        before: what would have handled it.

    Attributes:
        gained: whether anything was finished in this run.
    """

    def __init__(self, signum: int, before: Any = None) -> None:
        super().__init__(128 + signum)
        self.signum: signal.Signals = signal.Signals(signum)
        self.before = before
        self.gained = False

    def __str__(self) -> str:
        """Name the signal."""
        return self.signum.name


class StopSignals:
    """Notes signals instead of dying of them, for as long as it is entered (once or more often).

    The first lets the block at hand be finished, a second ends the work at the next pass. Outside
    of the main thread, where signals cannot be caught, it notes none.

    Attributes:
        received: the signals so far, in their order.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._last = float("-inf")
        self._forward: Callable[[int], None] = lambda signum: None
        self._before: dict[int, Any] = {}
        self._depth = 0

    def __enter__(self) -> StopSignals:
        """Begin to listen, unless it did."""
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            before: dict[int, Any] = {signum: signal.getsignal(signum) for signum in SIGNALS}
            if before[signal.SIGHUP] == signal.SIG_IGN:  # `nohup` means to go on
                del before[signal.SIGHUP]
            self._before = before
            self.listen()
        return self

    def listen(self, forward: Callable[[int], None] | None = None) -> None:
        """Listen again, after somebody else put a handler of theirs in the place.

        Args:
            forward: called with each signal from now on, to hand it on to processes that depend
                on this one.
        """
        self._forward = forward or self._forward
        for signum in self._before:
            signal.signal(signum, self._note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back to whoever had them."""
        self._depth -= 1
        for signum, handler in self._before.items() if self._depth == 0 else ():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def between_blocks(self) -> None:
        """End the work if any signal came.

        Raises:
            Stopped: one did.
        """
        if self.received:
            raise Stopped(self.received[0], self._before.get(self.received[0]))

    def between_passes(self) -> None:
        """End the work if a second signal came.

        Raises:
            Stopped: it did.
        """
        if len(self.received) > 1:
            self.between_blocks()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last > SECONDS_OF_ONE_REQUEST:
            self.received.append(signum)
            self._forward(signum)
        self._last = now
