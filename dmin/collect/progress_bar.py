"""What one sees of a long collection."""

from __future__ import annotations

import sys
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

from dmin.runtime.progress import Lines


class CollectionProgress(ProgressBar):
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

    def on_predict_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin to count: what precedes the first gradient is over."""
        place = f" in process 0 of {trainer.world_size}" if trainer.world_size > 1 else ""
        self._lines = Lines(self.label, self.examples, place=place)
        if self._on and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
            )
            self._task = self._bar.add_task(f"{self.label}{place}", total=self.examples, rate="")
            self._bar.start()

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        *_: Any,
    ) -> None:
        """Count the examples of a block; tell, if it is time to."""
        _, rows = outputs
        if rows is None:
            return
        self.done += sum(len(part["id"]) for part in batch)
        line = self._lines.told(self.done)
        if self._bar is not None:
            rate = f"{self._lines.rate():,.3g}/s"
            self._bar.update(self._task, completed=self.done, rate=rate)
        elif self._on and line is not None:
            print(line, flush=True)

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
