"""Resuming: what a store lacks is found, claimed and computed; a new store lacks everything."""

from __future__ import annotations

from pathlib import Path

from dmin.collect.collector import Collector
from dmin.collect.completion import finished, wait_for_others
from dmin.collect.fsdp import is_sharded, shardable_copy
from dmin.collect.options import CollectOptions
from dmin.collect.peak_memory import PeakMemory
from dmin.collect.session import Session
from dmin.collect.trainer import Trainer
from dmin.data.base import Dataset
from dmin.data.module import CollectData
from dmin.runtime.signals import Stopped, StopSignals
from dmin.runtime.transfer import kept_devices
from dmin.store import Store, StoreWriter
from dmin.workers.heartbeat import Heartbeat
from dmin.workers.shard import Shard

# What processes that were told to stop have to seal what is finished, while others wait for them.
SECONDS_TO_STOP = 30.0


def resume(
    collector: Collector,
    dataset: Dataset,
    path: Path,
    options: CollectOptions,
    trainer: Trainer,
    stop: StopSignals,
    peak: PeakMemory,
) -> Store:
    """Compute the blocks that a store lacks of a shard, and return it.

    Args:
        collector: computes the rows.
        dataset: the examples.
        path: the store's folder.
        options: how it is collected.
        trainer: runs the session.
        stop: signals heard so far.
        peak: is told what the passes take.

    Raises:
        DminError: see :meth:`dmin.collect.GradientCollector.collect`.
        Stopped: a signal came; the block at hand was finished, and all is sealed.
    """
    share = Shard(options.shard, options.shards, trainer.global_rank, trainer.world_size)
    manifest = collector.manifest(dataset, options.block_size, options.dtype, options.as_queries)
    encodings = collector.encodings_cache(manifest, path, options.encodings)
    worker = collector
    if options.as_queries:
        worker = worker.with_model(worker.model.for_queries())
    if is_sharded(trainer):
        worker = shardable_copy(worker)
    lost: dict[Shard, str] = {}
    with (
        stop,
        StoreWriter(
            path,
            manifest,
            segment_bytes=options.segment_bytes,
            seal_seconds=options.seal_seconds,
            verify=share == Shard(ranks=share.ranks),  # once is enough: the end verifies all
        ) as writer,
    ):
        pending = share.pending(writer.pending(), manifest.num_blocks)
        if pending:
            heartbeat = Heartbeat(path, share)
            heartbeat.claim(manifest.num_blocks, options.wait)
            pending = share.pending(writer.pending(), manifest.num_blocks)
            data = CollectData(
                dataset, pending, options.block_size, options.workers, is_sharded(trainer)
            )
            session = Session(worker, data, writer, heartbeat, stop, encodings, peak)
            with kept_devices([collector.model.network, *collector.encoders.values()]):
                lost = _run_with_others(session, trainer)
    store = finished(path, share, lost)
    if encodings is not None and not options.keep_encodings:
        if store.complete:
            encodings.remove()
        elif share.is_first:
            encodings.remove(share.range(manifest.num_blocks))
    return store


def _run_with_others(session: Session, trainer: Trainer) -> dict[Shard, str]:
    """Do this process's blocks, and wait for the other processes; return who was lost."""
    stop = session.stop
    with session.heartbeat as heartbeat:
        try:
            stop.between_blocks()
            session.run(trainer)
            heartbeat.say(state="waiting")
            return wait_for_others(heartbeat, stop)
        except Stopped as stopped:
            stopped.gained = heartbeat.gained
            heartbeat.say(state="waiting")
            wait_for_others(heartbeat, limit=SECONDS_TO_STOP)
            raise
