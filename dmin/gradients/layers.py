"""Per-example gradients of one layer call, kept as factors until somebody needs numbers.

For a layer whose output gradient is ``d`` and whose input is ``a`` the gradient of its weight is,
for one example, a product of the two: a sum of outer products over positions for ``Linear``, a
correlation for convolutions. Each supported layer type has a function here, registered with
:func:`gradient_of`, that returns the factors of each of its parameters; ``dense()`` multiplies
them out. A slice ``factors[i:j]`` holds examples i to j only, so that a caller can keep to a memory
budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HALF = torch.bfloat16, torch.float16
_SUMS_WIDE = "dtype" in torch.ops.aten.bmm.overloads()  # torch 2.8 and later


class GradientFactors(Protocol):
    """The gradients of one parameter for each example of a batch, not multiplied out."""

    @property
    def batch(self) -> int:
        """Number of examples."""

    def dense(self) -> Tensor:
        """Return the gradients, ``[batch, *parameter.shape]``, in float32 or float64."""

    def __getitem__(self, examples: slice) -> GradientFactors:
        """Return the factors of some of the examples."""


@dataclass(frozen=True)
class Dense:
    """A gradient already formed, ``[batch, *parameter.shape]``."""

    gradient: Tensor

    @property
    def batch(self) -> int:
        """Number of examples."""
        return len(self.gradient)

    def dense(self) -> Tensor:
        """Return a copy, so that callers may work in place whatever the factors are."""
        return wide(self.gradient).clone()

    def __getitem__(self, examples: slice) -> Dense:
        """Return the gradients of some of the examples."""
        return Dense(self.gradient[examples])


@dataclass(frozen=True)
class Outer:
    """A sum of outer products over positions, the gradient of a ``Linear`` weight.

    ``g[b] = Σ_p output_gradient[b, p] ⊗ input[b, p]``
    """

    output_gradient: Tensor  # [batch, positions, out]
    input: Tensor  # [batch, positions, in]

    @property
    def batch(self) -> int:
        """Number of examples."""
        return len(self.input)

    def dense(self) -> Tensor:
        """Return ``[batch, out, in]``.

        A GPU multiplies half precision on its tensor cores and adds up in float32, which is exact
        but for the order of the sum.
        """
        d, a = self.output_gradient, self.input
        if d.is_cuda and d.dtype == a.dtype and d.dtype in _HALF and _SUMS_WIDE:
            return torch.bmm(d.transpose(1, 2), a, out_dtype=torch.float32)
        return torch.bmm(wide(d).transpose(1, 2), wide(a))

    def __getitem__(self, examples: slice) -> Outer:
        """Return the factors of some of the examples."""
        return Outer(self.output_gradient[examples], self.input[examples])


@dataclass(frozen=True)
class Correlation:
    """The gradient of a convolution's weight (1, 2 or 3 dimensions, transposed or not)."""

    output_gradient: Tensor  # [batch, out, *positions]
    input: Tensor  # [batch, in, *positions], already padded unless the padding is zeros
    layer: nn.modules.conv._ConvNd
    padding: tuple[int, ...]

    # Up to this many output positions one batched product of unfolded patches beats a call of the
    # convolution's own backward for each example (measured on two CPU cores, 8² against 32²).
    UNFOLD_POSITIONS = 256

    @property
    def batch(self) -> int:
        """Number of examples."""
        return len(self.input)

    def dense(self) -> Tensor:
        """Return ``[batch, *weight.shape]``."""
        layer, shape = self.layer, self.layer.weight.shape
        outer = self.as_outer() if self.output_gradient.is_cuda else None
        if outer is not None:  # one product of the batch, summed in a fixed order
            formed = outer.dense().unflatten(2, (-1, shape[1])).transpose(2, 3)
            return formed.reshape(-1, *shape)
        d, a = wide(self.output_gradient), wide(self.input)
        if (
            type(layer) is nn.Conv2d
            and layer.groups == 1
            and d[0, 0].numel() <= self.UNFOLD_POSITIONS
        ):
            patches = F.unfold(
                a, layer.kernel_size, layer.dilation, self.padding, layer.stride
            )  # [batch, in·kh·kw, positions]
            return torch.bmm(d.flatten(2), patches.transpose(1, 2)).view(-1, *shape)
        gradients = d.new_empty(len(d), *shape)
        weight = layer.weight.detach().to(d.dtype)
        for example in range(len(d)):
            gradients[example] = torch.ops.aten.convolution_backward(
                d[example : example + 1],
                a[example : example + 1],
                weight,
                None,
                layer.stride,
                self.padding,
                layer.dilation,
                layer.transposed,
                self._output_padding(),
                layer.groups,
                [False, True, False],
            )[1]
        return gradients

    def as_outer(self) -> Outer | None:
        """Return the same gradients as outer products of outputs and patches (tap, input).

        None for groups of channels and transposed convolutions, which are none.
        """
        layer, d = self.layer, self.output_gradient.flatten(2).transpose(1, 2)
        if layer.groups > 1 or layer.transposed:
            return None
        a = F.pad(self.input, [p for n in reversed(self.padding) for p in (n, n)])
        batch, channels, *places = a.stride()
        steps = [n * s for n, s in zip(places, layer.stride, strict=True)]
        taps = [n * s for n, s in zip(places, layer.dilation, strict=True)]
        sizes = *self.output_gradient.shape[2:], *layer.kernel_size
        patches = a.as_strided(
            (len(a), *sizes, a.shape[1]), (batch, *steps, *taps, channels), a.storage_offset()
        )
        return Outer(d, patches.reshape(len(a), d.shape[1], -1))

    def _output_padding(self) -> list[int]:
        """Return what a transposed convolution added at the far end, in this very call.

        ``layer(x, output_size=...)`` overrides the layer's own setting.
        """
        layer = self.layer
        if not layer.transposed:
            return [0] * len(self.padding)
        return [
            out - ((size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for out, size, stride, padding, dilation, kernel in zip(
                self.output_gradient.shape[2:],
                self.input.shape[2:],
                layer.stride,
                self.padding,
                layer.dilation,
                layer.kernel_size,
                strict=True,
            )
        ]

    def __getitem__(self, examples: slice) -> Correlation:
        """Return the factors of some of the examples."""
        return Correlation(
            self.output_gradient[examples], self.input[examples], self.layer, self.padding
        )


@dataclass(frozen=True)
class Rows:
    """The gradient of an ``Embedding``: output gradients added at the rows that were looked up."""

    output_gradient: Tensor  # [batch, positions, width]
    index: Tensor  # [batch, positions], integer
    rows: int

    @property
    def batch(self) -> int:
        """Number of examples."""
        return len(self.index)

    def dense(self) -> Tensor:
        """Return ``[batch, rows, width]``."""
        d = wide(self.output_gradient)
        gradients = d.new_zeros(len(d), self.rows, d.shape[-1])
        if d.is_cuda:  # in a fixed order
            example = torch.arange(len(d), device=d.device)[:, None]
            return gradients.index_put_((example, self.index), d, accumulate=True)
        return gradients.scatter_add_(1, self.index[..., None].expand_as(d), d)

    def __getitem__(self, examples: slice) -> Rows:
        """Return the factors of some of the examples."""
        return Rows(self.output_gradient[examples], self.index[examples], self.rows)


@dataclass(frozen=True)
class Sum:
    """The sum of several calls' gradients: a layer called more than once, or tied weights."""

    parts: Sequence[GradientFactors]

    @property
    def batch(self) -> int:
        """Number of examples."""
        return self.parts[0].batch

    def dense(self) -> Tensor:
        """Return ``[batch, *parameter.shape]``."""
        total = self.parts[0].dense()
        for part in self.parts[1:]:
            total += part.dense()
        return total

    def __getitem__(self, examples: slice) -> Sum:
        """Return the factors of some of the examples."""
        return Sum([part[examples] for part in self.parts])


# A layer's function: (layer, its input, the gradient of its output, batch) -> {parameter: factors}.
# Input and output gradient have `batch` rows, or a multiple: parts of examples, folded.
LayerGradient = Callable[[Any, Tensor, Tensor, int], dict[str, GradientFactors]]
_LAYERS: dict[type[nn.Module], tuple[LayerGradient, Callable[[Any], bool]]] = {}


def gradient_of(
    *types: type[nn.Module], unless: Callable[[Any], bool] = lambda layer: False
) -> Callable[[LayerGradient], LayerGradient]:
    """Register a function as the per-example gradient of some layer types.

    Args:
        types: layers that take one tensor and return one, with a row for each example in both.
        unless: says of a layer that the function does not hold for its settings.
    """

    def register(function: LayerGradient) -> LayerGradient:
        for layer_type in types:
            _LAYERS[layer_type] = (function, unless)
        return function

    return register


def layer_gradient(layer: nn.Module) -> LayerGradient | None:
    """Return the function for a layer, or None when dmin has no closed form for it.

    A subclass counts as its parent only while it keeps the parent's ``forward``: another forward
    is another derivative.
    """
    for parent in type(layer).__mro__:
        if parent in _LAYERS:
            function, unless = _LAYERS[parent]
            same = type(layer).forward is parent.forward
            return function if same and not unless(layer) else None
    return None


def splits(layer: nn.Module, a: Tensor, batch: int) -> bool:
    """Return whether the rows of a layer's input can be told apart by example.

    Not so for what all examples share: a table of positions, a vector without a batch.
    """
    if isinstance(layer, nn.Embedding):
        return a.ndim > 0 and len(a) == batch
    if isinstance(layer, nn.modules.conv._ConvNd):
        features = 1 + len(layer.kernel_size)
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        features = len(layer.normalized_shape)
    else:
        features = 1
    return a.ndim > features and len(a) % batch == 0


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
)
def convolution(
    layer: nn.modules.conv._ConvNd, a: Tensor, d: Tensor, batch: int
) -> dict[str, GradientFactors]:
    """Return the correlation of input and output gradient, and the latter summed."""
    sides = layer._reversed_padding_repeated_twice  # last dimension first, as F.pad wants it
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


@gradient_of(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    """Return ``Σ d·â`` and ``Σ d`` over positions; â is the normalised input."""
    normalised = F.group_norm(wide(a), layer.num_groups, eps=layer.eps)
    d = wide(d)
    shape = (batch, len(d) // batch, layer.num_channels, -1)
    # In place: on a CPU the pages of a fresh tensor cost more than its numbers.
    scale = normalised.mul_(d).reshape(shape).sum((1, 3))
    shift = d.reshape(shape).sum((1, 3))
    return {"weight": Dense(scale), "bias": Dense(shift)}


@gradient_of(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    """Return ``Σ d·â`` and ``Σ d`` over tokens; â is the normalised input."""
    normalised = F.layer_norm(wide(a), layer.normalized_shape, eps=layer.eps)
    return affine(normalised, wide(d), layer.normalized_shape, batch)


@gradient_of(nn.RMSNorm)
def rms_norm(layer: nn.RMSNorm, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    """Return ``Σ d·â`` over tokens; â is the normalised input."""
    # Without an eps torch takes that of the dtype it computes in: float32 for bfloat16 too.
    normalised = F.rms_norm(wide(a), layer.normalized_shape, eps=layer.eps)
    return affine(normalised, wide(d), layer.normalized_shape, batch)


@gradient_of(
    nn.Embedding,
    # These change weights or gradients with the batch.
    unless=lambda layer: layer.max_norm is not None or layer.scale_grad_by_freq,
)
def embedding(layer: nn.Embedding, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    """Return the output gradients as rows to be added up where they were looked up."""
    index = a.reshape(batch, -1)
    d = d.reshape(batch, index.shape[1], -1)
    if layer.padding_idx is not None:
        d = d.masked_fill((index == layer.padding_idx)[..., None], 0)
    return {"weight": Rows(d, index, layer.num_embeddings)}


def affine(
    normalised: Tensor, d: Tensor, shape: tuple[int, ...], batch: int
) -> dict[str, GradientFactors]:
    """Gradients of scale and shift behind a normalisation over the last dimensions.

    The normalised input is overwritten.
    """
    scale = normalised.mul_(d).reshape(batch, -1, *shape).sum(1)
    return {"weight": Dense(scale), "bias": Dense(d.reshape(batch, -1, *shape).sum(1))}


def parts_of(x: Tensor, batch: int) -> Tensor:
    """Return ``[batch, parts, ...]``: one part an example, more where they are folded into rows."""
    return x.unflatten(0, (batch, len(x) // batch))


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or float64 when it is that already: sums over positions need it."""
    return x if x.dtype == torch.float64 else x.float()
