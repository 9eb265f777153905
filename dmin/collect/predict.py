"""The Lightning side of collecting: what happens before, at and after each block."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from rich.progress import track

from dmin.collect.encodings import leave_device, on_device
from dmin.collect.memory import (
    PeakMemory,
    agree_on_microbatch,
    find_microbatch,
    gradient_checkpointing,
    note_of,
)
from dmin.data.module import Blocks, CollectData
from dmin.errors import DminError
from dmin.store import Rows, StoreWriter

if TYPE_CHECKING:
    from dmin.collect.collector import GradientCollector


class Preparation(Callback):
    """What precedes the first gradient: encoding, and finding the size of the microbatch.

    Args:
        data: the blocks to do.
        writer: of the store that they go to.
    """

    def __init__(self, data: CollectData, writer: StoreWriter) -> None:
        self.data = data
        self.writer = writer

    def on_predict_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Prepare this process's blocks; the network is on its device by now."""
        collector: Any = pl_module
        if torch.is_inference_mode_enabled():
            raise DminError(
                "trainer.inference_mode is on, which forbids gradients. Set "
                "trainer.inference_mode=false (Trainer(inference_mode=False))."
            )
        collector.peak = PeakMemory(collector.device)
        rank, world = trainer.global_rank, trainer.world_size
        data = self.data
        mine = Blocks(data.blocks, data.block_size, len(data.dataset), rank, world).blocks
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

    def encode(
        self, trainer: lightning.Trainer, collector: GradientCollector, blocks: list[int]
    ) -> None:
        """Encode blocks, one at a time, and have the encoders leave the device."""
        assert collector.encodings is not None
        if not blocks:  # all encoded before; a trainer may have moved the encoders all the same
            leave_device(collector.encoders)
            return
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with on_device(collector.encoders, collector.device), torch.no_grad():
            loader = track(self._load(blocks), "Encoding", len(blocks), disable=not shown)
            for block, batch in zip(blocks, loader, strict=True):
                batch = trainer.strategy.batch_to_device(batch, collector.device)
                collector.encodings.save(block, *collector.model.encode(batch))

    def find(self, trainer: lightning.Trainer, collector: GradientCollector, block: int) -> int:
        """Find the size of the microbatch on one block."""
        (batch,) = self._load([block])
        batch = trainer.strategy.batch_to_device(batch, collector.device)
        batch = trainer.precision_plugin.convert_input(batch)
        with trainer.precision_plugin.predict_step_context():
            passes = collector.passes(*collector.encode(batch), batch["id"])
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
        writer: the store's writer, one a process.
    """

    def __init__(self, writer: StoreWriter) -> None:
        super().__init__("batch")
        self.writer = writer

    def write_on_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        prediction: tuple[int, Rows],
        *_: Any,
    ) -> None:
        """Append one block."""
        position, rows = prediction
        self.writer.append(position // self.writer.manifest.block_size, rows)
        if trainer.received_sigterm:  # Lightning notes the signal, but predict loops never ask
            raise SystemExit(128 + signal.SIGTERM)

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Seal the last blocks, then wait for the other processes to have sealed theirs.

        Not at the end of prediction, which a process without any block never reaches.
        """
        self.writer.close()
        trainer.strategy.barrier("dmin: every process has sealed its blocks")

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        """Seal what is finished before the exception ends the process."""
        self.writer.close()


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


def predict(
    collector: GradientCollector,
    data: CollectData,
    writer: StoreWriter,
    trainer: lightning.Trainer,
) -> None:
    """Run a trainer over the blocks to do; the model is given back as and where it was."""
    refuse_cast(collector, trainer)
    mine = [Preparation(data, writer), SketchWriter(writer)]
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    network = collector.model.network
    homes = places({"": network, **collector.encoders})
    callbacks.extend(mine)
    try:
        with (
            warnings.catch_warnings(),
            gradient_checkpointing(network, collector.gradient_checkpointing),
        ):
            # `workers` was chosen, and blocks are all there is: neither warning tells news.
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*custom batch sampler.*")
            trainer.predict(collector, datamodule=data, return_predictions=False)
    finally:
        for callback in mine:
            callbacks.remove(callback)
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
