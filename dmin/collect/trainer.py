"""The Lightning trainer for collecting, and the temporary changes to a model during a run."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Trainer
from torch import nn

from dmin.collect.collector import Collector
from dmin.models.contract import check_precision
from dmin.runtime.errors import DminError
from dmin.runtime.transfer import kept_devices

CASTS = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}


def predict_trainer(**settings: Any) -> Trainer:
    """Return a Lightning trainer for collecting: no inference mode, logger or checkpoints.

    Args:
        settings: arguments of ``lightning.Trainer``, which override these defaults.
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
    return Trainer(**{**fit, **settings})


def refuse_cast(network: nn.Module, trainer: Trainer) -> None:
    """Refuse a precision that no fingerprint tells, or that would cast the user's weights for good.

    Raises:
        DminError: names the precision and the type of the weights.
    """
    check_precision(network)
    if str(trainer.precision).endswith("-mixed"):
        raise DminError(
            f"trainer.precision={trainer.precision}: gradients would have another "
            f"precision than the store records. Set 32-true, with the network "
            f"in bfloat16 (model.torch_dtype=bfloat16) if wanted."
        )
    wanted = CASTS.get(str(trainer.precision))
    found = {p.dtype for p in network.parameters() if p.is_floating_point()}
    if wanted is not None and found != {wanted}:
        raise DminError(
            f"trainer.precision={trainer.precision} would cast the model's weights "
            f"({', '.join(sorted(str(dtype) for dtype in found))}) permanently: the next store "
            f"would be of other weights. Load the model in that type (model.torch_dtype), "
            f"or set trainer.precision=32-true."
        )


@contextmanager
def placed_as_collected(collector: Collector, trainer: Trainer) -> Iterator[torch.device]:
    """Have a collector's model as a run has it: on the device, in the precision, in eval mode."""
    model = collector.model
    training = {module: module.training for module in model.modules()}
    with kept_devices([model.network, *collector.encoders.values()]):
        try:
            trainer.precision_plugin.convert_module(model)
            model.eval().to(trainer.strategy.root_device)
            yield trainer.strategy.root_device
        finally:
            for module, mode in training.items():
                module.training = mode


@contextmanager
def gradient_checkpointing(network: nn.Module, on: bool) -> Iterator[None]:
    """Have a network recompute its activations in backward for a while, if asked to.

    Raises:
        DminError: the network does not offer it.
    """
    if not on or getattr(network, "is_gradient_checkpointing", False):
        yield
        return
    try:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise DminError(
            f"collect.gradient_checkpointing=true, but {type(network).__name__} does not support "
            f"it. Set it to false and collect.microbatch lower."
        ) from error
    try:
        yield
    finally:
        network.disable_gradient_checkpointing()  # type: ignore[operator]


@contextmanager
def frozen_gc() -> Iterator[None]:
    """Spare Python's garbage collector what is there already: the model, all that was imported.

    Watching a network makes thousands of objects a pass, so that a search of them all, a quarter of
    a second, would come every few passes.
    """
    if gc.get_freeze_count():  # somebody does it already
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
