"""Train a diffusion model on a dataset, or on a subset of it."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ProgressBar
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from dmin.data.base import Dataset, Examples
from dmin.data.ids import facts_at, facts_of
from dmin.data.module import TrainData
from dmin.diffusion.inputs import NoisedBatch
from dmin.models.base import DiffusionModel, per_example_loss
from dmin.models.labels import names_of
from dmin.models.masked import encode, predict
from dmin.runtime.errors import DminError
from dmin.runtime.progress import Lines


class StepLines(ProgressBar):
    """Prints how far a training is, and its loss, now and then: for log files."""

    _on = True

    def disable(self) -> None:
        """Show nothing; called by Lightning in all processes but the first."""
        self._on = False

    def enable(self) -> None:
        """Show."""
        self._on = True

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Begin to count."""
        self._lines = Lines("training", int(trainer.num_training_batches), "steps")

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count a step; tell, if it is time to."""
        line = self._lines.due(batch_idx + 1)
        if self._on and line is not None:
            print(f"{line}, loss {trainer.callback_metrics['loss']:.3g}", flush=True)


ModelFactory = Callable[[], DiffusionModel]
"""Builds an untrained model; weights are drawn from torch's global generator."""


@dataclass(frozen=True)
class LoRA:
    """A low-rank adapter, trained on part of the examples after the network on all others.

    Args:
        column: of the metadata.
        value: that the examples of the second training have in it.
        steps: optimiser steps of the second training.
        learning_rate: of it.
        rank: of the adapter; its α is the same.
        modules: names of the layers that get one, by their ends.
    """

    column: str
    value: str
    steps: int = 500
    learning_rate: float = 1e-3
    rank: int = 4
    modules: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")

    def parts(self, dataset: Dataset) -> tuple[Examples, Examples]:
        """Return the examples of the first and of the second training.

        Raises:
            DminError: one of them has none.
        """
        examples = [dataset[i] for i in range(len(dataset))]
        is_second = [str(e.metadata.get(self.column)) == self.value for e in examples]
        first = [e for e, later in zip(examples, is_second, strict=True) if not later]
        second = [e for e, later in zip(examples, is_second, strict=True) if later]
        if not first or not second:
            raise DminError(
                f"train.lora: {len(second)} of {len(examples)} examples have {self.column}="
                f"{self.value}; both trainings need some."
            )
        return Examples(first), Examples(second)

    def add_to(self, network: Any) -> None:
        """Give a network an adapter that changes nothing yet, and freeze all else.

        Raises:
            DminError: peft is not installed.
        """
        try:
            from peft import LoraConfig
        except ModuleNotFoundError as error:
            raise DminError("train.lora needs peft: pip install 'dmin[lora]'.") from error
        network.add_adapter(
            LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(self.modules))
        )


class DiffusionTrainer(lightning.LightningModule):
    """Minimises the model's own loss at uniformly drawn timesteps.

    Args:
        model: trained in place.
        learning_rate: of AdamW, reached after ``warmup`` steps, then decayed to zero by a cosine.
        warmup: steps of linear warm-up.
        steps: total steps, for the cosine.
        seed: key of timesteps and noise.
    """

    def __init__(
        self, model: DiffusionModel, learning_rate: float, warmup: int, steps: int, seed: int
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.warmup = warmup
        self.steps = steps
        self.generator: torch.Generator = torch.Generator().manual_seed(seed)
        self.timesteps: Tensor = torch.tensor(list(model.timesteps))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        x0, condition = encode(self.model, batch)
        noise = torch.randn(x0.shape, generator=self.generator).to(x0)
        drawn = torch.randint(len(self.timesteps), (len(x0),), generator=self.generator)
        t = self.timesteps[drawn].to(x0.device)
        loss = per_example_loss(predict(self.model, NoisedBatch(x0, noise, t, condition))).mean()
        if not torch.isfinite(loss):
            raise DminError(
                f"the training loss became {loss.item()} at step {batch_idx}. Lower "
                f"train.learning_rate (now {self.learning_rate:g}) or check the images."
            )
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW with warm-up and cosine decay."""
        parameters = [p for p in self.model.network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=max(1, self.warmup))
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, max(1, self.steps - self.warmup)
        )
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, decay], [self.warmup])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def train(
    model: ModelFactory,
    dataset: Dataset,
    *,
    steps: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    warmup: int = 100,
    ema_decay: float = 0.995,
    seed: int = 0,
    workers: int = 0,
    lora: LoRA | None = None,
    trainer: lightning.Trainer | None = None,
) -> DiffusionModel:
    """Train a new model on a dataset for a fixed number of steps.

    Args:
        model: builds the untrained model; called after seeding, so the start is the seed's.
        dataset: the training examples.
        steps: optimiser steps.
        batch_size: examples per step.
        learning_rate: of AdamW.
        warmup: steps of linear warm-up.
        ema_decay: the weights returned are an exponential moving average with this decay a step.
        seed: key of weights, order, timesteps and noise.
        workers: processes that load examples.
        lora: a second training, of an adapter on some of the examples, which the first one then
            does without; the same batches, warm-up and average.
        trainer: any Lightning trainer for one epoch; :func:`fit_trainer` if none.

    Returns:
        The model in eval mode, with averaged weights.

    Raises:
        DminError: the dataset is empty, labels do not fit the model's classes, a setting is out of
            range, or the loss became NaN.
    """
    if len(dataset) == 0:
        raise DminError("train: the dataset is empty, so there is nothing to train on.")
    if steps < 1 or not 0 <= ema_decay < 1:
        raise DminError(
            f"train.steps={steps}, train.ema_decay={ema_decay}: at least one step and a decay in "
            f"[0, 1) are needed."
        )
    lightning.seed_everything(seed, verbose=False)
    found = model()
    learn_labels(found, dataset)
    trainer = trainer or fit_trainer()
    first, second = (dataset, None) if lora is None else lora.parts(dataset)

    def fit(dataset: Dataset, steps: int, learning_rate: float) -> None:
        module = DiffusionTrainer(found.train(), learning_rate, warmup, steps, seed)
        _fit(trainer, module, TrainData(dataset, batch_size, steps, seed, workers), ema_decay)

    fit(first, steps, learning_rate)
    if lora is not None and second is not None:
        lora.add_to(found.network)
        fit(second, lora.steps, lora.learning_rate)
    return found.eval()


def learn_labels(model: DiffusionModel, dataset: Dataset) -> None:
    """Have a class-conditional model map labels that are text to classes, in their order.

    Raises:
        DminError: there are more than the model has classes, or not all are text.
    """
    classes: int | None = getattr(model, "classes", None)
    if classes is not None and isinstance(facts_at(dataset, 0).label, str):
        model.label_names = names_of((facts.label for facts in facts_of(dataset)), classes)


def _fit(
    trainer: lightning.Trainer, module: DiffusionTrainer, data: TrainData, ema_decay: float
) -> None:
    """Train a model in place; it ends with its weights averaged."""
    callbacks: list[Any] = cast(Any, trainer).callbacks
    bars = [] if sys.stdout.isatty() else [c for c in callbacks if isinstance(c, ProgressBar)]
    mine = [EMAWeightAveraging(decay=ema_decay), *([StepLines()] if bars else [])]
    for bar in bars:
        callbacks.remove(bar)
    callbacks.extend(mine)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*lr_scheduler.step.*")
            trainer.fit_loop.epoch_progress.reset()
            trainer.fit(module, datamodule=data)
    finally:
        for callback in mine:
            callbacks.remove(callback)
        callbacks.extend(bars)


def fit_trainer(**settings: Any) -> lightning.Trainer:
    """Return a Lightning trainer for one pass over a fixed number of batches.

    Args:
        settings: arguments of ``lightning.Trainer``, which override these defaults.
    """
    fit = {
        "accelerator": "auto",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**{**fit, **settings})
