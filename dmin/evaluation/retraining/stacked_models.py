"""Many models of the same architecture as one: stacked weights, losses by one call."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmin.data.base import Dataset, collate
from dmin.diffusion.inputs import NoisedBatch
from dmin.models.base import Condition, DiffusionModel, per_example_loss
from dmin.models.masked import encode, predict
from dmin.runtime.errors import DminError

Stacked = dict[str, Tensor]
"""The parameters of several models by name, ``[models, *shape]``."""


class StackedLoss(nn.Module):
    """A model's loss of each example as a function of its weights, for :func:`vmap`.

    Args:
        model: prepared by :func:`for_vmap`.
    """

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Return the loss of each example with the model's own weights."""
        return per_example_loss(predict(self.model, NoisedBatch(x0, noise, t, condition)))

    def of(
        self, weights: Stacked, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition
    ) -> Tensor:
        """Return the loss of each example with the weights of one of the models."""
        named = {f"model.network.{name}": values for name, values in weights.items()}
        found: Tensor = functional_call(self, named, (x0, noise, t, condition))
        return found


def for_vmap(model: DiffusionModel) -> DiffusionModel:
    """Replace group norms in place: torch's own uses a memory format that vmap lacks."""
    for module in model.network.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = partial(_group_norm, module)  # type: ignore[method-assign]
    return model


def _group_norm(module: nn.GroupNorm, x: Tensor) -> Tensor:
    grouped = x.reshape(len(x), module.num_groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    normed = centred * (centred.square().mean(2, keepdim=True) + module.eps).rsqrt()
    if module.weight is None:
        return normed.view(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    return normed.view(x.shape) * module.weight.view(shape) + module.bias.view(shape)


def encoded(
    model: DiffusionModel, dataset: Dataset, device: torch.device | None = None
) -> tuple[Tensor, Condition]:
    """Return a whole dataset as inputs of a model."""
    batch: dict[str, Any] = collate([dataset[i] for i in range(len(dataset))])
    if "drawn" in batch:
        raise DminError(
            "Retraining uses whole examples, not random draws of them: set data.draws=null"
        )
    device = device or torch.device("cpu")
    batch["image"] = batch["image"].to(device)
    with torch.no_grad():
        x0, condition = encode(model, batch)
    return x0.to(device), {name: values.to(device) for name, values in condition.items()}
