"""The Lightning side of collecting: what happens before, at and after each block."""

from __future__ import annotations

import signal
import socket
import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, ProgressBar
from lightning.pytorch.strategies import DDPStrategy

from dmin.collect.background import Arriving, BackgroundWriter
from dmin.collect.encodings import leave_device, on_device
from dmin.collect.fsdp import LockstepPasses, explain_lost_peer, shardable_copy
from dmin.collect.microbatch import (
    PeakMemory,
    agree_on_microbatch,
    find_microbatch,
    frozen_gc,
    gradient_checkpointing,
    note_of,
)
from dmin.collect.progress_bar import CollectionProgress
from dmin.data.module import CollectData
from dmin.runtime.errors import DminError
from dmin.runtime.progress import followed
from dmin.runtime.signals import StopSignals
from dmin.store import StoreWriter
from dmin.workers.heartbeat import Heartbeat

if TYPE_CHECKING:
    from dmin.collect.collector import GradientCollector


class Work(NamedTuple):
    """One process's collecting: which blocks, where to, who is told, what may end it."""

    data: CollectData
    writer: StoreWriter
    progress: Heartbeat
    stop: StopSignals


class Preparation(Callback):
    """What precedes the first gradient: encoding, and finding the size of the microbatch.

    Args:
        work: the blocks to do, and the store that they go to.
    """

    def __init__(self, work: Work) -> None:
        self.data, self.writer, self.progress, self.stop = work

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Have all processes of the job do blocks of one list, in one folder.

        Raises:
            DminError: a process does not see the folder of the first one.
        """
        if trainer.world_size == 1:
            return
        strategy, progress = trainer.strategy, self.progress
        # Each process looked for what is pending at its own time.
        self.data.blocks, run = strategy.broadcast((self.data.blocks, progress.run))
        progress.joins(run)
        seen = progress.sees_first()
        if not strategy.reduce_boolean_decision(seen, all=True):
            blind = f"{socket.gethostname()} (rank {trainer.global_rank}) does not see"
            raise DminError(
                f"{'another machine of this job does not see' if seen else blind} the store that "
                f"rank 0 made at {progress.store}. All machines of a job must share that folder: "
                f"set paths.outputs (or collect.path) to a shared file system, and see that it is "
                f"mounted on every node."
            )

    def on_predict_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Prepare this process's blocks; the network is on its device by now."""
        collector: Any = pl_module
        self.stop.listen()  # Lightning's own handler waits for the other processes
        self.stop.forward = partial(_forward, trainer)
        if torch.is_inference_mode_enabled():
            raise DminError(
                "trainer.inference_mode is on, which forbids gradients. Set "
                "trainer.inference_mode=false (Trainer(inference_mode=False))."
            )
        collector.peak = PeakMemory(collector.device)
        shared = self.data.mine(trainer.global_rank, trainer.world_size)
        mine = list(dict.fromkeys(shared.blocks))
        if self.data.even:
            points = collector.noise.draws * len(collector.timesteps)
            pairs = min(collector.pairs, self.data.block_size * points)
            collector.in_step = LockstepPasses(trainer.strategy, shared.own, pairs)
        if collector.encodings is not None:
            self.encode(trainer, collector, collector.encodings.missing(mine))
        if collector.microbatch == "auto":
            note = note_of(
                self.writer.path,
                collector.device,
                manifest=self.writer.manifest.fingerprint,
                memory=collector.memory,
                budget=collector.budget,
                gradient_checkpointing=collector.gradient_checkpointing,
            )
            collector.pairs = agree_on_microbatch(
                note, lambda: self.find(trainer, collector, mine[0])
            )
        if isinstance(trainer.strategy, DDPStrategy) and trainer.strategy.launcher is not None:
            # No collective operation follows: a process that dies keeps no other from its work.
            trainer.strategy.launcher.ranks_are_apart = True  # type: ignore[attr-defined]
        self.progress.begin(shared.own)

    def encode(
        self, trainer: lightning.Trainer, collector: GradientCollector, blocks: list[int]
    ) -> None:
        """Encode blocks, one at a time, and have the encoders leave the device."""
        assert collector.encodings is not None
        if not blocks:  # all encoded before; a trainer may have moved the encoders all the same
            leave_device(collector.encoders)
            return
        self.progress.say(state="encoding", blocks=len(blocks))
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with on_device(collector.encoders, collector.device), torch.no_grad():
            loader = self._load(blocks)
            if shown:
                loader = followed(loader, "encoding", len(blocks), "blocks")
            for number, block in zip(blocks, loader, strict=True):
                block = trainer.strategy.batch_to_device(block, collector.device)
                collector.encodings.save(number, collector.encode_anew(block))
                self.progress.gained = True
                self.stop.between_blocks()

    def find(self, trainer: lightning.Trainer, collector: GradientCollector, block: int) -> int:
        """Find the size of the microbatch on one block: on its largest shape, if it has several."""
        (batches,) = self._load([block])
        batches = trainer.strategy.batch_to_device(batches, collector.device)
        batches = trainer.precision_plugin.convert_input(batches)
        with trainer.precision_plugin.predict_step_context():
            encoded = collector.encode(batches)
            largest = max(range(len(encoded)), key=lambda i: encoded[i][0][0].numel())
            passes = collector.passes(*encoded[largest], batches[largest]["id"])
            return find_microbatch(
                lambda size: passes.run(torch.arange(size)),
                passes.total,
                collector.device,
                collector.memory,
            )

    def _load(self, blocks: list[int]) -> Any:
        data = self.data
        return CollectData(data.dataset, blocks, data.block_size, data.workers).predict_dataloader()


class SketchWriter(BasePredictionWriter):
    """Hands each block's rows to the store; whatever ends the loop, finished blocks are sealed.

    Args:
        work: with the store's writer, one a process.
    """

    def __init__(self, work: Work) -> None:
        super().__init__("batch")
        self.writer = BackgroundWriter(work.writer, work.progress.block_done)
        self.block_size, self.stop = work.writer.manifest.block_size, work.stop
        self.in_step = work.data.even

    def write_on_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        prediction: tuple[int, Arriving | None],
        *_: Any,
    ) -> None:
        """Hand one block to the store's writer behind the loop, unless it is another process's."""
        position, rows = prediction
        if rows is not None:
            self.writer.append(position // self.block_size, rows)
        if self.in_step:  # whoever goes on alone would wait for the others' weights
            stops = trainer.strategy.reduce_boolean_decision(bool(self.stop.received), all=False)
            if not stops:
                return  # a signal that came since is told to the others after the next block
            if not self.stop.received:
                self.stop.received.append(signal.SIGTERM)
        self.stop.between_blocks()

    def between_passes(self) -> None:
        """Once a signal came, seal what is finished: this block may not be, in the time left."""
        if self.stop.received and not self.in_step:
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


def _forward(trainer: lightning.Trainer, signum: int) -> None:
    """Hand a signal on to the processes that Lightning started for this one."""
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signum)


def predict_trainer(**settings: Any) -> lightning.Trainer:
    """Return a Lightning trainer fit for collecting: no inference mode, logger or checkpoints.

    Args:
        settings: anything ``lightning.Trainer`` takes; wins over these defaults.
    """
    fit = {
        "accelerator": "auto",
        "devices": 1,
        "inference_mode": False,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**{**fit, **settings})


def predict(collector: GradientCollector, work: Work, trainer: lightning.Trainer) -> None:
    """Run a trainer over the blocks to do; the model is given back as and where it was."""
    refuse_cast(collector, trainer)
    writer = SketchWriter(work)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    theirs = [bar for bar in callbacks if isinstance(bar, ProgressBar)]
    shown = CollectionProgress(work.data.examples(trainer.global_rank, trainer.world_size))
    mine = [Preparation(work), writer, *([shown] if theirs else [])]
    for bar in theirs:
        callbacks.remove(bar)
    network = collector.model.network
    homes = places({"": network, **collector.encoders})
    callbacks.extend(mine)
    collector.between_passes = writer.between_passes
    try:
        with (
            warnings.catch_warnings(),
            shardable_copy(collector, trainer),
            explain_lost_peer(trainer),
            gradient_checkpointing(collector.model.network, collector.gradient_checkpointing),
            frozen_gc(),
        ):
            # `workers` was chosen, and blocks are all there is: neither warning tells news.
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*custom batch sampler.*")
            trainer.predict(collector, datamodule=work.data, return_predictions=False)
    finally:
        collector.in_step = None
        writer.writer.stop()  # it may have been left without its closing: the store's own follows
        shown.close()
        for callback in mine:
            callbacks.remove(callback)
        callbacks.extend(theirs)
        collector.between_passes = lambda: None
        collector.to(homes[""])
        for name, encoder in collector.encoders.items():
            encoder.to(homes[name])
    if trainer.interrupted:
        raise KeyboardInterrupt


CASTS = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}


def refuse_cast(collector: GradientCollector, trainer: lightning.Trainer) -> None:
    """Refuse a precision for which Lightning would cast the user's weights, for good.

    Raises:
        DminError: names the precision and the type of the weights.
    """
    wanted = CASTS.get(str(trainer.precision))
    found = {p.dtype for p in collector.model.network.parameters() if p.is_floating_point()}
    if wanted is not None and found != {wanted}:
        raise DminError(
            f"trainer.precision={trainer.precision} would cast the model's weights "
            f"({', '.join(sorted(str(dtype) for dtype in found))}) and leave them so: the next "
            f"store would be one of other weights. Load the model in that type "
            f"(model.torch_dtype), or take trainer.precision=bf16-mixed or 32-true."
        )


def places(modules: Mapping[str, torch.nn.Module]) -> dict[str, torch.device]:
    """Return the device of each module; the CPU for one without any parameter."""
    found = {}
    for name, module in modules.items():
        first = next(module.parameters(), None)
        found[name] = torch.device("cpu") if first is None else first.device
    return found
