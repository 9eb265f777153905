"""The progress bar of a collection."""

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
)

from dmin.runtime.progress import Lines


class CollectionProgress(ProgressBar):
    """Shows the progress of the first process, its rate and the time left.

    Args:
        examples: of this process.
        points: (timestep, draw) pairs of each.
        label: a name for the examples.
    """

    def __init__(self, examples: int, points: int = 1, label: str = "gradients") -> None:
        super().__init__()
        self.examples = examples
        self.points = points
        self.label = label
        self.done = 0
        self._pairs = 0  # done of the block at hand
        self._bar: Progress | None = None
        self._lines: Lines | None = None  # not while the trainer shows nothing
        self._on = True

    def disable(self) -> None:
        """Show nothing; called by Lightning in all processes but the first."""
        self._on = False

    def enable(self) -> None:
        """Show."""
        self._on = True

    def on_predict_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Start counting, just before the first gradient."""
        place = f" in process 0 of {trainer.world_size}" if trainer.world_size > 1 else ""
        self._lines = Lines(self.label, self.examples, place=place)
        if self._on and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
            )
            name = f"{self.label}{place}"
            self._task = self._bar.add_task(name, total=self.examples, rate="", left="")
            self._bar.start()

    def pass_done(self, pairs: int) -> None:
        """Count the pairs of a pass, as parts of their examples."""
        self._pairs += pairs
        done = self.done + self._pairs / self.points
        if done < self.examples:  # of the last pass the end of its block tells
            self._show(done)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._on and self._lines is not None:
            print(text, flush=True)

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        *_: Any,
    ) -> None:
        """Count the examples of a block; print if due."""
        _, rows = outputs
        self._pairs = 0
        if rows is None:
            return
        self.done += sum(len(part["id"]) for part in batch)
        self._show(self.done)

    def _show(self, done: float) -> None:
        if self._lines is None:
            return
        line = self._lines.due(done)
        if self._bar is not None:
            rate, left = f"{self._lines.rate():,.3g}/s", self._lines.ahead()
            self._bar.update(self._task, completed=done, rate=rate, left=left)
        elif self._on and line is not None:
            print(line, flush=True)

    def on_predict_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Leave the bar."""
        self.close()

    def close(self) -> None:
        """Restore the terminal, also after an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
