"""Collect a store, or resume it: find the missing blocks, claim them and compute them."""

from pathlib import Path
from typing import Any

from dmin.collect.collector import Collector
from dmin.collect.completion import finished, wait_for_others
from dmin.collect.fsdp import is_sharded, shardable_copy
from dmin.collect.options import CollectOptions
from dmin.collect.peak_memory import PeakMemory
from dmin.collect.prediction import require_space, rows_left
from dmin.collect.session import Session
from dmin.collect.trainer import Trainer, predict_trainer
from dmin.data.base import Dataset
from dmin.data.module import CollectData
from dmin.runtime.signals import Stopped, StopSignals
from dmin.runtime.transfer import kept_devices
from dmin.store import Store, StoreWriter
from dmin.workers.heartbeat import Heartbeat
from dmin.workers.lock import claim
from dmin.workers.shard import Shard

# What processes that were told to stop have to seal what is finished, while others wait for them.
SECONDS_TO_STOP = 30.0


class GradientCollector(Collector):
    """A collector that makes stores; its settings are those of :class:`Collector`.

    Attributes:
        peak: the memory of the last collection in this process.
        checks: seconds spent on examining networks and checking rows.
    """

    peak: PeakMemory = PeakMemory()
    checks: float = 0.0

    def collect(
        self,
        dataset: Dataset,
        path: str | Path,
        *,
        trainer: Trainer | None = None,
        stop: StopSignals | None = None,
        **settings: Any,
    ) -> Store:
        """Collect the features of a dataset into a store, or resume it.

        The work is cut into blocks of consecutive examples. A killed run loses the blocks that were
        not sealed; the same call computes exactly the missing ones, with the same bits on a CPU.

        A model with encoders is collected in two phases: each process first encodes its blocks into
        files, then its encoders leave the device, and gradients are computed from the files.
        Encoders run in their own precision, not the trainer's.

        Args:
            dataset: examples with stable ids.
            path: the store's folder; created, or resumed if its manifest is the same.
            trainer: any Lightning trainer; :func:`predict_trainer` if none.
            stop: signals received so far; if None, a handler is installed.
            settings: the fields of :class:`CollectOptions`.

        Returns:
            The store, with all blocks of the shard; verified if complete.

        Raises:
            DminError: bad data, a NaN gradient, a different store at the path, another process
                working on the same blocks, or a lost process of this job.
            Stopped: a signal arrived; the current block was finished, and all is sealed.
        """
        options, path = CollectOptions(**settings), Path(path)
        trainer, self.peak = trainer or predict_trainer(), PeakMemory()
        share = Shard(options.shard, options.shards, trainer.global_rank, trainer.world_size)
        manifest = self.manifest(
            dataset, options.block_size, options.dtype, options.as_queries, path
        )
        encodings = self.encodings_cache(manifest, path, options.encodings)
        worker: Collector = self
        if options.as_queries:
            worker = worker.with_model(worker.model.for_queries())
        if is_sharded(trainer):
            worker = shardable_copy(worker)
        with (
            stop or StopSignals() as stop,
            StoreWriter(
                path,
                manifest,
                segment_bytes=options.segment_bytes,
                seal_seconds=options.seal_seconds,
                verify=share == Shard(ranks=share.ranks),  # once is enough: the end verifies all
            ) as writer,
            kept_devices([self.model.network, *self.encoders.values()]),
        ):
            session = Session(worker, writer, Heartbeat(path, share), stop, encodings, self.peak)
            lost = _collect_missing(session, dataset, options, trainer)
            self.checks = session.guard.seconds + worker.ownership.seconds
        store = finished(path, share, lost)
        if encodings is not None and not options.keep_encodings:
            if store.complete:
                encodings.remove()
            elif share.is_first:
                encodings.remove(share.range(manifest.num_blocks))
        return store


def _collect_missing(
    session: Session, dataset: Dataset, options: CollectOptions, trainer: Trainer
) -> dict[Shard, str]:
    """Compute the missing blocks of this process's share; return which processes were lost."""
    stop, heartbeat, store = session.stop, session.heartbeat, session.store
    blocks = store.manifest.num_blocks
    if not heartbeat.share.pending(store.pending(), blocks):
        return {}
    needed = require_space(rows_left(session.collector, store))
    bar = trainer.is_global_zero and trainer.progress_bar_callback is not None
    if bar and not options.as_queries:
        print(f"disk: {needed}", flush=True)
    claim(heartbeat, blocks, options.wait)
    pending = heartbeat.share.pending(store.pending(), blocks)  # others went on meanwhile
    data = CollectData(dataset, pending, options.block_size, options.workers, is_sharded(trainer))
    with heartbeat:
        try:
            stop.between_blocks()
            session.run(trainer, data)
            heartbeat.say(state="waiting")
            return wait_for_others(heartbeat, stop)
        except Stopped as stopped:
            stopped.gained = heartbeat.gained
            heartbeat.say(state="waiting")
            wait_for_others(heartbeat, limit=SECONDS_TO_STOP)
            raise
