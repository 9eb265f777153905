"""Losses that count some places more than others: a mask goes around the model, not through it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dmin.diffusion.inputs import NoisedBatch
from dmin.models.base import Condition, Prediction
from dmin.runtime.errors import DminError

MASK = "loss_mask"
"""The name of a mask among the conditions, from encoding to the loss; no network is told it."""


def encode(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
    """Return what a model encodes a batch as, and the masks at the places of x0 if there are some.

    Args:
        model: a :class:`~dmin.models.base.DiffusionModel`.
        batch: as its ``encode`` takes it; ``mask [batch, 1, H, W]`` or None beside the images.

    Raises:
        DminError: x0 has no places that a mask could be laid over.
    """
    found = model.encode(batch)
    mask = batch.get("mask")
    if mask is None or not isinstance(found, tuple) or len(found) != 2:
        return found
    x0, condition = found
    if x0.ndim != 4:
        raise DminError(
            f"{type(model).__name__} diffuses x0 of {list(x0.shape)}, which is no image: masks of "
            f"the loss cannot be laid over it. Leave them out."
        )
    return x0, {**condition, MASK: adaptive_avg_pool2d(mask.to(x0), x0.shape[2:])}


def predict(model: Any, batch: NoisedBatch) -> Prediction:
    """Return what a model predicts for noised examples, with the mask of their loss."""
    mask = batch.condition.get(MASK)
    if mask is None:
        return model.predict(*batch)
    others = {name: value for name, value in batch.condition.items() if name != MASK}
    found = model.predict(batch.x0, batch.noise, batch.t, others)
    if found.dropped is not None:
        dropped = found.dropped._replace(prediction=found.dropped.prediction._replace(mask=mask))
        found = found._replace(dropped=dropped)
    return found._replace(mask=mask)
