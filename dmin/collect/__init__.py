"""From examples to a store of sketched gradients, in two phases: encode, then differentiate."""

from pathlib import Path
from typing import Any

from dmin.collect.collector import FEATURE_SCHEMA, Collector
from dmin.collect.features import Features
from dmin.collect.options import CollectOptions
from dmin.collect.peak_memory import PeakMemory
from dmin.collect.resume import resume
from dmin.collect.sketch_writer import SketchWriter
from dmin.collect.trainer import Trainer, placed_as_collected, predict_trainer
from dmin.data.base import Dataset
from dmin.runtime.signals import StopSignals
from dmin.store import Store

__all__ = [
    "FEATURE_SCHEMA",
    "CollectOptions",
    "Features",
    "GradientCollector",
    "PeakMemory",
    "SketchWriter",
    "Trainer",
    "placed_as_collected",
    "predict_trainer",
]


class GradientCollector(Collector):
    """A collector that makes stores; its settings are those of :class:`Collector`.

    Attributes:
        peak: the memory that the last collection took in this process.
    """

    peak = PeakMemory()

    def collect(
        self,
        dataset: Dataset,
        path: str | Path,
        *,
        trainer: Trainer | None = None,
        stop: StopSignals | None = None,
        **options: Any,
    ) -> Store:
        """Collect the features of a dataset into a store, or the rest of them if some are there.

        The work is cut into blocks of consecutive examples. A killed run loses the blocks that were
        not sealed yet; the same call computes exactly what is missing, to the same bits on a CPU.

        A model with encoders is collected in two phases: each process first encodes its blocks into
        files, then its encoders leave the device, and the gradients start from the files. They are
        encoded in the encoders' own precision, whatever the trainer's is.

        Args:
            dataset: examples with stable ids.
            path: the store's folder; made, or resumed if its manifest is the same.
            trainer: any Lightning trainer; :func:`predict_trainer` if none.
            stop: signals heard so far; if none, they are heard from here on.
            options: the fields of :class:`CollectOptions`.

        Returns:
            The store, with all blocks of the shard. Complete, it is verified.

        Raises:
            DminError: bad data, a NaN gradient, a store of something else at that path, another
                process at the same blocks, or a process of this job that was lost.
            Stopped: a signal came; the block at hand was finished, and all is sealed.
        """
        trainer, stop, self.peak = trainer or predict_trainer(), stop or StopSignals(), PeakMemory()
        how = CollectOptions(**options)
        return resume(self, dataset, Path(path), how, trainer, stop, self.peak)
