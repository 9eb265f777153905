"""Per-example gradients of diffusers' own normalizations, registered where this is imported."""

import torch
from diffusers.models.normalization import FP32LayerNorm, RMSNorm
from torch import Tensor

from dmin.gradients.factors import GradientFactors, wide
from dmin.gradients.layers import affine, gradient_of, layer_norm

gradient_of(FP32LayerNorm, features=lambda layer, output: len(layer.normalized_shape))(layer_norm)


@gradient_of(RMSNorm, features=lambda layer, output: len(layer.dim))
def rms_norm(layer: RMSNorm, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    """Return ``Σ d·â`` and ``Σ d`` over tokens, with ``â = a / √(mean(a²) + eps)``."""
    # The mean in float32, as in the layer, even for float64.
    mean = a.float().square().mean(-1, keepdim=True)
    normalised = wide(a) * torch.rsqrt(mean + layer.eps)
    return affine(normalised, wide(d), tuple(layer.dim), batch)
