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
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmin.errors import DminError


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
        return _wide(self.gradient).clone()

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
        """Return ``[batch, out, in]``."""
        return torch.bmm(_wide(self.output_gradient).transpose(1, 2), _wide(self.input))

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
        d, a = _wide(self.output_gradient), _wide(self.input)
        layer, shape = self.layer, self.layer.weight.shape
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
                layer.output_padding,
                layer.groups,
                [False, True, False],
            )[1]
        return gradients

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
        d = _wide(self.output_gradient)
        gradients = d.new_zeros(len(d), self.rows, d.shape[-1])
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


# A layer's function: (layer, its input, the gradient of its output, batch) -> {parameter: factors}
LayerGradient = Callable[[nn.Module, Tensor, Tensor, int], dict[str, GradientFactors]]
_LAYERS: dict[type[nn.Module], LayerGradient] = {}


def gradient_of(*types: type[nn.Module]) -> Callable[[LayerGradient], LayerGradient]:
    """Register a function as the per-example gradient of some layer types."""

    def register(function: LayerGradient) -> LayerGradient:
        for layer_type in types:
            _LAYERS[layer_type] = function
        return function

    return register


def layer_gradient(layer: nn.Module) -> LayerGradient | None:
    """Return the function for a layer, or None when dmin has no closed form for its type.

    A subclass counts as its parent only while it keeps the parent's ``forward``: another forward
    is another derivative.
    """
    for parent in type(layer).__mro__:
        if parent in _LAYERS:
            return _LAYERS[parent] if type(layer).forward is parent.forward else None
    return None


def supported_layers() -> list[str]:
    """Return the names of the layer types that have a closed form."""
    return sorted(layer_type.__name__ for layer_type in _LAYERS)


@gradient_of(nn.Linear)
def _linear(layer: nn.Linear, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    d, a = _by_example(d, batch, layer).flatten(1, -2), _by_example(a, batch, layer).flatten(1, -2)
    return {"weight": Outer(d, a), "bias": Dense(_wide(d).sum(1))}


@gradient_of(
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
def _convolution(
    layer: nn.modules.conv._ConvNd, a: Tensor, d: Tensor, batch: int
) -> dict[str, GradientFactors]:
    if len(d) != batch:
        raise DminError(
            f"{type(layer).__name__} was given {len(d)} images for {batch} examples, which dmin "
            f"cannot attribute to examples. Leave the layer out with params=<regex>."
        )
    sides = layer._reversed_padding_repeated_twice  # last dimension first, as F.pad wants it
    padding: tuple[int, ...]
    if layer.padding_mode != "zeros":
        a, padding = F.pad(a, sides, mode=layer.padding_mode), (0,) * len(layer.kernel_size)
    elif isinstance(layer.padding, str):  # "same" may pad one side more than the other
        a, padding = F.pad(a, sides), (0,) * len(layer.kernel_size)
    else:
        padding = tuple(layer.padding)
    bias = _wide(d).flatten(2).sum(2)
    return {"weight": Correlation(d, a, layer, padding), "bias": Dense(bias)}


@gradient_of(nn.GroupNorm)
def _group_norm(
    layer: nn.GroupNorm, a: Tensor, d: Tensor, batch: int
) -> dict[str, GradientFactors]:
    normalised = F.group_norm(_wide(a), layer.num_groups, eps=layer.eps)
    d = _wide(d)
    weight = (d * normalised).flatten(2).sum(2)
    return {"weight": Dense(weight), "bias": Dense(d.flatten(2).sum(2))}


@gradient_of(nn.LayerNorm)
def _layer_norm(
    layer: nn.LayerNorm, a: Tensor, d: Tensor, batch: int
) -> dict[str, GradientFactors]:
    normalised = F.layer_norm(_wide(a), layer.normalized_shape, eps=layer.eps)
    return _affine(normalised, _wide(d), layer.normalized_shape, batch, layer)


@gradient_of(nn.RMSNorm)
def _rms_norm(layer: nn.RMSNorm, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    # torch's default eps is that of the *input's* dtype, so it is fixed before widening.
    eps = torch.finfo(a.dtype).eps if layer.eps is None else layer.eps
    normalised = F.rms_norm(_wide(a), layer.normalized_shape, eps=eps)
    return _affine(normalised, _wide(d), layer.normalized_shape, batch, layer)


@gradient_of(nn.Embedding)
def _embedding(layer: nn.Embedding, a: Tensor, d: Tensor, batch: int) -> dict[str, GradientFactors]:
    if layer.max_norm is not None or layer.scale_grad_by_freq:
        raise DminError(
            "an Embedding with max_norm or scale_grad_by_freq changes its weights or gradients with "
            "the batch, so it has no per-example gradient. Leave it out with params=<regex>."
        )
    index = a.reshape(batch, -1)
    d = d.reshape(batch, index.shape[1], -1)
    if layer.padding_idx is not None:
        d = d.masked_fill((index == layer.padding_idx)[..., None], 0)
    return {"weight": Rows(d, index, layer.num_embeddings)}


def _affine(
    normalised: Tensor, d: Tensor, shape: tuple[int, ...], batch: int, layer: nn.Module
) -> dict[str, GradientFactors]:
    """Gradients of scale and shift behind a normalisation over the last dimensions."""
    scale = _by_example(d * normalised, batch, layer).reshape(batch, -1, *shape).sum(1)
    shift = _by_example(d, batch, layer).reshape(batch, -1, *shape).sum(1)
    return {"weight": Dense(scale), "bias": Dense(shift)}


def _by_example(x: Tensor, batch: int, layer: nn.Module) -> Tensor:
    """Return ``[batch, positions..., features]`` also when tokens were folded into the batch."""
    if len(x) != batch:
        if len(x) % batch:
            raise DminError(
                f"{type(layer).__name__} was given {len(x)} rows for {batch} examples, which dmin "
                f"cannot attribute to examples. Leave the layer out with params=<regex>."
            )
        x = x.unflatten(0, (batch, len(x) // batch))
    return x.unsqueeze(1) if x.ndim == 2 else x


def _wide(x: Tensor) -> Tensor:
    """Return x in float32, or float64 when it is that already: sums over positions need it."""
    return x if x.dtype == torch.float64 else x.float()
