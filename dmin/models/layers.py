"""Per-example gradients of diffusers' own layers, registered where it keeps their types."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from torch import Tensor

from dmin.layer_gradients import Dense, GradientFactors, gradient_of


@gradient_of(RMSNorm)
def rms_norm(layer: RMSNorm, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    """Return ``Σ d·â`` and ``Σ d`` over tokens, with ``â = a / √(mean(a²) + eps)``."""
    a = _wide(a)
    normalised = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + layer.eps)
    return _affine(normalised, _wide(d), layer.dim, batch)


@gradient_of(FP32LayerNorm)
def layer_norm(
    layer: FP32LayerNorm, a: Tensor, d: Tensor, batch: int
) -> dict[str, GradientFactors]:
    """Return ``Σ d·â`` and ``Σ d`` over tokens; â is the normalised input."""
    normalised = F.layer_norm(_wide(a), layer.normalized_shape, eps=layer.eps)
    return _affine(normalised, _wide(d), layer.normalized_shape, batch)


def _affine(
    normalised: Tensor, d: Tensor, shape: Sequence[int], batch: int
) -> dict[str, GradientFactors]:
    scale, shift = ((x.reshape(batch, -1, *shape).sum(1)) for x in (d * normalised, d))
    return {"weight": Dense(scale), "bias": Dense(shift)}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
