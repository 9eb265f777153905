"""The session: one Lightning run over blocks of examples, with all its mutable state."""

import socket
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies import DDPStrategy

from dmin.collect.collector import Collector
from dmin.collect.encodings_cache import Encoded, EncodingsCache
from dmin.collect.features import Block, Features, rows_of
from dmin.collect.fsdp import LockstepPasses, explain_lost_peer, shard
from dmin.collect.guard import Guard
from dmin.collect.microbatch import agree_on_microbatch, examined_size, find_microbatch, note_of
from dmin.collect.peak_memory import PeakMemory
from dmin.collect.prediction import Forecast, encoding_bytes, require_space, rows_left
from dmin.collect.progress_bar import CollectionProgress
from dmin.collect.sketch_writer import BackgroundWriter, SketchWriter
from dmin.collect.trainer import frozen_gc, gradient_checkpointing, refuse_cast
from dmin.data.module import CollectData
from dmin.diffusion.inputs import NoisedBatch
from dmin.gradients.ownership import Ownership, Trial
from dmin.models.contract import encoded
from dmin.runtime.errors import DminError
from dmin.runtime.progress import followed
from dmin.runtime.signals import StopSignals
from dmin.runtime.transfer import leave_device, on_device
from dmin.store import Rows, StoreWriter
from dmin.workers.heartbeat import Heartbeat


class Session(lightning.LightningModule):
    """The run of one process: encode its blocks, find the size of a pass, then differentiate.

    Args:
        collector: defines what is computed; not changed.
        store: that rows are written to.
        heartbeat: reports the progress of this process.
        stop: signals that end the run.
        encodings: the cache of encodings; None for a model without encoders.
        peak: records the memory of the passes.
    """

    def __init__(
        self,
        collector: Collector,
        store: StoreWriter,
        heartbeat: Heartbeat,
        stop: StopSignals,
        encodings: EncodingsCache | None,
        peak: PeakMemory,
    ) -> None:
        super().__init__()
        self.collector = collector
        self.model = collector.model
        self.store = store
        self.heartbeat = heartbeat
        self.stop = stop
        self.encodings = encodings
        self.peak = peak
        self.guard: Guard = Guard(collector, collector.ownership)
        self.pairs: int = collector.pairs  # in one pass
        self.lockstep: LockstepPasses | None = None  # with those that share the network
        self._first: tuple[list[int], str] | None = None  # shape and name of the first example
        # Fewer blocks may be left to do than there are processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def run(self, trainer: lightning.Trainer, data: CollectData) -> None:
        """Compute this process's blocks; the trainer's callbacks are restored.

        Args:
            trainer: runs the loop.
            data: the blocks of all processes of the job.

        Raises:
            DminError: bad data, a NaN gradient, an incompatible setting, or a lost process.
            Stopped: a signal arrived; finished blocks are sealed.
        """
        network = self.model.network
        self.data = data
        refuse_cast(network, trainer)
        background = BackgroundWriter(self.store, self.heartbeat.block_done)
        self.writer: SketchWriter = SketchWriter(background, self.stop, lockstep=data.even)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        before = list(callbacks)
        examples = data.examples(trainer.global_rank, trainer.world_size)
        points = self.collector.noise.draws * len(self.collector.timesteps)
        what = "gradients" if self.collector.readouts else "losses"
        shown = self.shown = CollectionProgress(examples, points, what)
        bars = [bar for bar in before if isinstance(bar, ProgressBar)]
        others = [callback for callback in before if callback not in bars]
        callbacks[:] = [*others, self.writer, *([shown] if bars else [])]
        try:
            with (
                warnings.catch_warnings(),
                explain_lost_peer(trainer),
                gradient_checkpointing(network, self.collector.gradient_checkpointing),
                frozen_gc(),
            ):
                # `workers` was chosen, and blocks are all there is: neither warning tells news.
                warnings.filterwarnings("ignore", ".*does not have many workers.*")
                warnings.filterwarnings("ignore", ".*custom batch sampler.*")
                trainer.predict(self, datamodule=data, return_predictions=False)
        finally:
            # It may have been left without its closing: the store's own follows.
            background.stop()
            shown.close()
            callbacks[:] = before
        if trainer.interrupted:
            raise KeyboardInterrupt

    def setup(self, stage: str) -> None:
        """Agree with all processes of the job on one list of blocks in one folder.

        Raises:
            DminError: a process cannot see the folder of the first one.
        """
        if self.trainer.world_size == 1:
            return
        strategy, heartbeat = self.trainer.strategy, self.heartbeat
        # Each process looked for what is pending at its own time.
        self.data.blocks, run = strategy.broadcast((self.data.blocks, heartbeat.run))
        heartbeat.joins(run)
        seen = heartbeat.sees_first()
        if not strategy.reduce_boolean_decision(seen, all=True):
            blind = f"{socket.gethostname()} (rank {self.trainer.global_rank}) does not see"
            raise DminError(
                f"{'another machine of this job cannot see' if seen else blind} the store that "
                f"rank 0 made at {heartbeat.store}. All machines of a job must share that folder: "
                f"set paths.outputs (or collect.path) to a shared file system of all nodes."
            )

    def configure_model(self) -> None:
        """Shard the network, if that is the trainer's strategy."""
        if self.device_mesh is not None:
            offload = getattr(self.trainer.strategy, "offload", False)
            mesh = self.device_mesh["data_parallel"]
            shard(self.model.network, mesh, offload, self.model.externally_called)

    def on_predict_start(self) -> None:
        """Prepare for the first gradient; the network is on its device by now."""
        trainer, collector, strategy = self.trainer, self.collector, self.trainer.strategy
        # Lightning's own handler waits for the other processes.
        self.stop.listen(partial(_forward, trainer))
        if torch.is_inference_mode_enabled():
            raise DminError(
                "trainer.inference_mode is on, which forbids gradients. Set "
                "trainer.inference_mode=false (Trainer(inference_mode=False))."
            )
        self.peak.start(self.device)
        self.forecast: Forecast = Forecast(self.shown.examples * self.shown.points, self.device)
        shared = self.data.mine(trainer.global_rank, trainer.world_size)
        mine = list(dict.fromkeys(shared.blocks))
        if self.data.even:
            pairs = min(self.pairs, self.data.block_size * self.shown.points)
            self.lockstep = LockstepPasses(strategy, shared.own, pairs, collector.networks)
            agree = partial(strategy.reduce_boolean_decision, all=False)
            self.guard = Guard(collector, Ownership(agree), alone=False)
        if self.encodings is not None:
            self._encode_blocks(self.encodings, self.encodings.missing(mine))
        else:
            self._try_shapes()
        if collector.microbatch == "auto":
            self.pairs = self._find_microbatch(mine[0])
        if isinstance(strategy, DDPStrategy) and strategy.launcher is not None:
            # No collective operation follows: a process that dies keeps no other from its work.
            strategy.launcher.ranks_are_apart = True  # type: ignore[attr-defined]
        self.heartbeat.begin(shared.own)

    def predict_step(self, block: Block, batch_idx: int) -> tuple[int, Callable[[], Rows] | None]:
        """Return a block's number, and what waits for its rows.

        A GPU may still be at them: nothing here waits for it. None for rows if the block is
        another process's, and was done to keep step with it.
        """
        collector, encoded = self.collector, self._encoded(block)
        inputs = [
            collector.inputs(*each, batch["id"]) for each, batch in zip(encoded, block, strict=True)
        ]
        if self.lockstep is not None:
            self.lockstep.begin_block(inputs)
        parts = [collector.passes(each, self.pairs, self._pass) for each in inputs]
        for part, each, batch in zip(parts, inputs, block, strict=True):
            self.guard.confirm_zeros(part, each, batch["id"])
        if self.lockstep is not None and not self.lockstep.end_block(batch_idx):
            return self._number(block), None
        return self._number(block), rows_of(block, parts, collector.timesteps)

    def _pass(self, batch: NoisedBatch) -> Features:
        self.writer.between_passes()
        run, known = partial(self.guard.run, peak=self.peak), self.forecast.text
        with self.forecast.timed(batch):
            found = run(batch) if self.lockstep is None else self.lockstep.padded(batch, run)
        self.shown.pass_done(len(batch.t))
        if known != self.forecast.text:
            self.shown.say(f"time: {self.forecast.text}")
        return found

    def _number(self, block: Block) -> int:
        return int(min(block[0]["position"])) // self.data.block_size

    def _encoded(self, block: Block) -> list[Encoded]:
        """Return a block's encodings, from the cache if there is one, else from the model."""
        if self.encodings is None:
            return self._encode(block)
        loaded = self.encodings.load(self._number(block), self.device)
        found: list[Encoded] = self.trainer.precision_plugin.convert_input(loaded)
        self._check_shapes(found, block)
        return found

    @torch.no_grad()
    def _encode(self, block: Block) -> list[Encoded]:
        found = [encoded(self.model, batch) for batch in block]
        self._check_shapes(found, block)
        return found

    def _try_shapes(self) -> None:
        """Encode one example of each known shape first: what does not fit is refused at once."""
        for block in self.data.one_of_each_shape():
            self._encode(self.trainer.strategy.batch_to_device(block, self.device))

    def _check_shapes(self, encoded: Sequence[Encoded], block: Block) -> None:
        """Refuse a second shape unless noise.shapes says how shapes share noise."""
        for (x0, _), batch in zip(encoded, block, strict=True):
            shape, name = list(x0.shape[1:]), batch["id"][0]
            self._first = self._first or (shape, name)
            if self.collector.noise.shapes == "one" and shape != self._first[0]:
                raise DminError(
                    f"the noised tensors have several shapes: {self._first[1]!r} is "
                    f"{self._first[0]}, {name!r} {shape}. Choose how shapes share noise: "
                    f"noise.shapes=field uses the same noise at each position, so that scores of "
                    f"several shapes are meaningful; noise.shapes=own draws different noise for "
                    f"each. Or scale all images to one size: data.size=<pixels> data.aspect=square."
                )

    def _encode_blocks(self, encodings: EncodingsCache, blocks: list[int]) -> None:
        """Encode blocks one at a time, then move the encoders off the device."""
        trainer, encoders = self.trainer, self.collector.encoders.values()
        if not blocks:  # all encoded before; a trainer may have moved the encoders all the same
            return leave_device(encoders)
        self.heartbeat.say(state="encoding", blocks=len(blocks))
        with on_device(encoders, self.device):
            self._try_shapes()
            loader = self._load(blocks)
            if trainer.is_global_zero and trainer.progress_bar_callback is not None:
                loader = followed(loader, "encoding", len(blocks), "blocks")
            for number, block in zip(blocks, loader, strict=True):
                block = trainer.strategy.batch_to_device(block, self.device)
                found = self._encode(block)
                encodings.save(number, found)
                if number == blocks[0]:
                    left = self.data.block_size * len(encodings.missing(self.data.blocks))
                    size = int(encoding_bytes(found, sum(len(b["id"]) for b in block)) * left)
                    rows = rows_left(self.collector, self.store)
                    require_space(rows | {"encodings meanwhile": (encodings.folder, size)})
                self.heartbeat.gained = True
                self.stop.between_blocks()

    def _find_microbatch(self, block: int) -> int:
        """Return the size saved next to the store, or find it on one block and save it."""
        names = ("memory", "budget", "gradient_checkpointing")
        how: dict[str, Any] = {"manifest": self.store.manifest.fingerprint}
        how |= {name: getattr(self.collector, name) for name in names}
        note = note_of(self.store.path, self.device, **how)
        return agree_on_microbatch(note, partial(self._try_sizes, block))

    def _try_sizes(self, block: int) -> int:
        """Find the microbatch on one block, for its largest shape."""
        collector, precision = self.collector, self.trainer.precision_plugin
        (batches,) = self._load([block])
        batches = self.trainer.strategy.batch_to_device(batches, self.device)
        batches = precision.convert_input(batches)
        with precision.predict_step_context():
            encoded = self._encoded(batches)
            largest = max(range(len(encoded)), key=lambda i: encoded[i][0][0].numel())
            inputs = collector.inputs(*encoded[largest], batches[largest]["id"])
            pairs = collector.networks.largest(inputs)
            run = lambda known, n: collector.run(inputs.at(pairs[:n]), known, self.peak)  # noqa: E731
            attempt = partial(run, Trial())
            size = find_microbatch(attempt, len(pairs), self.device, collector.memory)
            return examined_size(run, size, self.device) if self.guard.alone else size

    def _load(self, blocks: list[int]) -> Any:
        data = self.data
        return CollectData(data.dataset, blocks, data.block_size, data.workers).predict_dataloader()


def _forward(trainer: lightning.Trainer, signum: int) -> None:
    """Forward a signal to the processes that Lightning started."""
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signum)
