"""Masked losses: a wrapper that weights the squared error of a model by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dmin.diffusion.inputs import SHARED, NoisedBatch
from dmin.models.base import Condition, Prediction
from dmin.runtime.errors import DminError

COUNT = "loss_count"
"""Condition with the weight of each pair in a sum over examples; not passed to the network."""
MASK = "loss_mask"
"""Condition with the mask of the loss; not passed to the network."""


def encode(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
    """Return the result of a model's ``encode``, with masks at the resolution of x0 if any.

    Args:
        model: a :class:`~dmin.models.base.DiffusionModel`.
        batch: the argument of its ``encode``, optionally with ``mask [batch, 1, H, W]``.

    Raises:
        DminError: there are masks, and x0 is not an image.
    """
    if "drawn" in batch:
        return side_by_side([encode(model, each) for each in batch["drawn"]])
    found = model.encode(batch)
    mask = batch.get("mask")
    if mask is None or not isinstance(found, tuple) or len(found) != 2:
        return found
    x0, condition = found
    if x0.ndim != 4:
        raise DminError(
            f"{type(model).__name__} diffuses x0 of {list(x0.shape)}, which is not an image: "
            f"loss masks cannot be applied. Leave them out."
        )
    return x0, {**condition, MASK: adaptive_avg_pool2d(mask.to(x0), x0.shape[2:])}


def side_by_side(draws: Sequence[tuple[Tensor, Condition]]) -> tuple[Tensor, Condition]:
    """Join the encodings of several draws of the same examples; draws of one are adjacent."""
    x0 = torch.stack([x0 for x0, _ in draws], 1).flatten(0, 1)
    return x0, {
        name: value
        if name.startswith(SHARED)
        else torch.stack([condition[name] for _, condition in draws], 1).flatten(0, 1)
        for name, value in draws[0][1].items()
    }


def count_of(batch: NoisedBatch) -> Tensor:
    """Return the weight of each pair in a sum over examples, ``[pairs]``, usually 1."""
    return batch.condition.get(COUNT, torch.ones(len(batch.t), device=batch.t.device))


def predict(model: Any, batch: NoisedBatch) -> Prediction:
    """Return the result of a model's ``predict`` for noised examples, with the loss mask."""
    told = {name: v for name, v in batch.condition.items() if name not in (MASK, COUNT)}
    found, mask = model.predict(*batch[:3], told), batch.condition.get(MASK)
    if mask is None:
        return found
    if found.dropped is not None:
        dropped = found.dropped._replace(prediction=found.dropped.prediction._replace(mask=mask))
        found = found._replace(dropped=dropped)
    return found._replace(mask=mask)
