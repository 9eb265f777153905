"""Per-example gradients of one layer call, by layer type.

Each supported type has a function here, registered with :func:`gradient_of`, that returns the
factors (:mod:`dmin.gradients.factors`) of the gradient of each of the layer's parameters.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dmin.gradients.factors import Correlation, Dense, GradientFactors, Outer, Rows, Sum, wide

# A layer's function: (layer, its input, the gradient of its output, batch) -> {parameter: factors}.
# The first axis of input and output gradient is `batch`, or a multiple if it includes other axes.
LayerGradient = Callable[[Any, Tensor, Tensor, int], dict[str, GradientFactors]]
# Attributes that define what a layer computes.
_COMPUTES = {"forward", "_conv_forward", "_output_padding", "__call__", "_call_impl", "__getattr__"}
_LAYERS: dict[type[nn.Module], tuple[LayerGradient, Callable, Callable]] = {}


def gradient_of(
    *types: type[nn.Module],
    unless: Callable[[Any], bool] = lambda layer: False,
    features: Callable[[Any, Tensor], int] = lambda layer, output: 1,
) -> Callable[[LayerGradient], LayerGradient]:
    """Register a function as the per-example gradient of some layer types.

    Args:
        types: layers that take one tensor and return one, both with rows for each example.
        unless: returns True for a layer with settings for which the function is invalid.
        features: returns the number of trailing output axes that form one row, which the layer
            computes independently: a token of a ``Linear``, an image of a convolution.
    """

    def register(function: LayerGradient) -> LayerGradient:
        for layer_type in types:
            _LAYERS[layer_type] = (function, unless, features)
        _registered.cache_clear()
        return function

    return register


def layer_gradient(layer: nn.Module) -> LayerGradient | None:
    """Return the function for a layer, or None if dmin has no closed form for it.

    There is none for a subclass, or an instance, that replaces ``forward`` or another attribute
    that defines the computation, since the derivative may differ.
    """
    kind: Any = type(layer)
    registered = _registered(kind)
    if registered is None or not vars(layer).keys().isdisjoint(_COMPUTES):
        return None
    function, unless, _, replaced = registered
    return None if replaced or unless(layer) else function


def features_of(layer: nn.Module, output: Tensor) -> int:
    """Return the number of trailing output axes that form one row of a layer's output."""
    kind: Any = type(layer)
    registered = _registered(kind)
    assert registered is not None
    return registered[2](layer, output)


@functools.cache
def _registered(kind: Any) -> tuple[LayerGradient, Callable, Callable, bool] | None:
    """Return what is registered for a type, and whether the type replaces the computation."""
    replaced: set[str] = set()
    for parent in kind.__mro__:
        if parent in _LAYERS:
            return *_LAYERS[parent], not replaced.isdisjoint(_COMPUTES)
        replaced |= vars(parent).keys()
    return None


@gradient_of(nn.Linear)
def linear(layer: nn.Linear, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    """Return ``Σ_p d_p ⊗ a_p`` and ``Σ_p d_p`` over positions p."""
    d, a = parts_of(d, batch).flatten(1, -2), parts_of(a, batch).flatten(1, -2)
    return {"weight": Outer(d, a), "bias": Dense(wide(d).sum(1))}


@gradient_of(
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    features=lambda layer, output: 1 + len(layer.kernel_size),
)
def convolution(
    layer: nn.modules.conv._ConvNd, a: Tensor, d: Tensor, batch: int
) -> dict[str, GradientFactors]:
    """Return the correlation of input and output gradient, and the sum of the latter."""
    sides = layer._reversed_padding_repeated_twice  # last dimension first, as for F.pad
    padding: tuple[int, ...]
    if layer.padding_mode != "zeros":
        a, padding = F.pad(a, sides, mode=layer.padding_mode), (0,) * len(layer.kernel_size)
    elif isinstance(layer.padding, str):  # "same" may pad one side more than the other
        a, padding = F.pad(a, sides), (0,) * len(layer.kernel_size)
    else:
        padding = tuple(layer.padding)
    a, d = parts_of(a, batch), parts_of(d, batch)
    parts = [Correlation(d[:, i], a[:, i], layer, padding) for i in range(a.shape[1])]
    bias = wide(d).flatten(3).sum((1, 3))
    return {"weight": parts[0] if len(parts) == 1 else Sum(parts), "bias": Dense(bias)}


@gradient_of(nn.GroupNorm, features=lambda layer, output: output.ndim - 1)
def group_norm(layer: nn.GroupNorm, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    """Return ``Σ d·â`` and ``Σ d`` over positions; â is the normalised input."""
    normalised = F.group_norm(wide(a), layer.num_groups, eps=layer.eps)
    d = wide(d)
    shape = (batch, len(d) // batch, layer.num_channels, -1)
    # In place: on a CPU, mapping memory for a new tensor costs more than the computation.
    scale = normalised.mul_(d).reshape(shape).sum((1, 3))
    shift = d.reshape(shape).sum((1, 3))
    return {"weight": Dense(scale), "bias": Dense(shift)}


@gradient_of(nn.LayerNorm, features=lambda layer, output: len(layer.normalized_shape))
def layer_norm(layer: nn.LayerNorm, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    """Return ``Σ d·â`` and ``Σ d`` over tokens; â is the normalised input."""
    normalised = F.layer_norm(wide(a), layer.normalized_shape, eps=layer.eps)
    return affine(normalised, wide(d), layer.normalized_shape, batch)


@gradient_of(nn.RMSNorm, features=lambda layer, output: len(layer.normalized_shape))
def rms_norm(layer: nn.RMSNorm, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    """Return ``Σ d·â`` over tokens; â is the normalised input."""
    # Without eps torch uses that of the dtype it computes in, which is float32 for bfloat16 too.
    normalised = F.rms_norm(wide(a), layer.normalized_shape, eps=layer.eps)
    return affine(normalised, wide(d), layer.normalized_shape, batch)


@gradient_of(
    nn.Embedding,
    # These settings make weights or gradients depend on the batch.
    unless=lambda layer: layer.max_norm is not None or layer.scale_grad_by_freq,
)
def embedding(layer: nn.Embedding, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    """Return the output gradients with the indices of the looked-up rows."""
    index = a.reshape(batch, -1)
    d = d.reshape(batch, index.shape[1], -1)
    if layer.padding_idx is not None:
        d = d.masked_fill((index == layer.padding_idx)[..., None], 0)
    return {"weight": Rows(d, index, layer.num_embeddings)}


def affine(
    normalised: Tensor, d: Tensor, shape: tuple[int, ...], batch: int
) -> dict[str, GradientFactors]:
    """Return the gradients of scale and shift after a normalisation over the last dimensions.

    The normalised input is overwritten.
    """
    scale = normalised.mul_(d).reshape(batch, -1, *shape).sum(1)
    return {"weight": Dense(scale), "bias": Dense(d.reshape(batch, -1, *shape).sum(1))}


def parts_of(x: Tensor, batch: int) -> Tensor:
    """Return ``[batch, parts, ...]``; parts > 1 if the first axis of x includes other axes."""
    return x.unflatten(0, (batch, len(x) // batch))
