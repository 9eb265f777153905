"""Gradients by plain autograd, which captured gradients are compared with."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from dmin.diffusion.inputs import NoisedBatch
from dmin.gradients.parameters import eager, named_parameters
from dmin.models.base import READOUTS, DiffusionModel
from dmin.models.masked import predict


def by_autograd(
    model: DiffusionModel, names: Collection[str], inputs: NoisedBatch, readout: str
) -> dict[str, Tensor]:
    """Return the gradients of a readout of one pair by plain autograd.

    Args:
        model: the model; ``requires_grad`` of its parameters is restored.
        names: names of the parameters.
        inputs: one pair.
        readout: a name in ``READOUTS``.

    Returns:
        Gradients ``[*shape]`` by name; zeros if the readout does not depend on the parameter.
    """
    named = named_parameters(model.network)
    chosen = {name: named[name] for name in names}
    required = {name: p.requires_grad for name, p in named.items()}
    try:
        for name, p in named.items():
            p.requires_grad_(name in chosen)
        with torch.enable_grad(), eager():
            value = READOUTS[readout](predict(model, inputs)).sum()
            found: Sequence[Tensor | None] = [None] * len(chosen)
            if value.requires_grad:
                found = torch.autograd.grad(value, list(chosen.values()), allow_unused=True)
    finally:
        for name, p in named.items():
            p.requires_grad_(required[name])
    return {
        name: torch.zeros_like(p) if gradient is None else gradient.to_dense()
        for (name, p), gradient in zip(chosen.items(), found, strict=True)
    }
