"""What one sees of a long collection: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Seconds after which a line is due, doubled after each up to the second number: a log of a day has
# some hundred.
FIRST, LAST = 15.0, 900.0


class Shown(ProgressBar):
    """Shows how many of its examples the first process has done, the rate and the time left.

    Args:
        examples: that this process has to do.
        label: what they are.
    """

    def __init__(self, examples: int, label: str = "gradients") -> None:
        super().__init__()
        self.examples = examples
        self.label = label
        self.done = 0
        self._bar: Progress | None = None
        self._on = True

    def disable(self) -> None:
        """Show nothing: Lightning calls it in all processes but the first."""
        self._on = False

    def enable(self) -> None:
        """Show."""
        self._on = True

    def on_predict_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin to count."""
        self._of = f" in process 0 of {trainer.world_size}" if trainer.world_size > 1 else ""
        self._start = time.monotonic()
        self._every = FIRST
        self._due = self._start + FIRST
        if self._on and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
            )
            self._task = self._bar.add_task(f"{self.label}{self._of}", total=self.examples, rate="")
            self._bar.start()

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        *_: Any,
    ) -> None:
        """Count the examples of a block; tell, if it is time to."""
        _, rows = outputs
        if rows is None:
            return
        self.done += len(rows.ids)
        if self._bar is not None:
            rate = f"{self._rate():,.3g}/s"
            self._bar.update(self._task, completed=self.done, rate=rate)
        elif self._on and (time.monotonic() >= self._due or self.done >= self.examples):
            print(self.line(), flush=True)
            self._every = min(2 * self._every, LAST)
            self._due = time.monotonic() + self._every

    def line(self) -> str:
        """Return one line for a log file."""
        rate = self._rate()
        left = self.examples - self.done
        ahead = f", {span(left / rate)} left" if left and rate else f" in {span(self._seconds())}"
        return (
            f"{self.label}: {self.done:,} of {self.examples:,} examples{self._of} "
            f"({self.done / self.examples:.1%}), {rate:,.3g} a second{ahead}"
        )

    def on_predict_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Leave the bar."""
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also after an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def _rate(self) -> float:
        return self.done / self._seconds()


def span(seconds: float) -> str:
    """Say a time in its two largest units: ``1 d 3 h``, ``12 min``, ``8 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
