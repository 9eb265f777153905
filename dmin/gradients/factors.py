"""The per-example gradients of one parameter as factors, multiplied out only when needed.

For a layer whose output gradient is ``d`` and whose input is ``a`` the gradient of its weight is,
for one example, a product of the two: a sum of outer products over positions for ``Linear``, a
correlation for convolutions. ``dense()`` multiplies them out. A slice ``factors[i:j]`` holds
examples i to j only, so that a caller can limit its memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HALF = torch.bfloat16, torch.float16
_SUMS_WIDE = "dtype" in torch.ops.aten.bmm.overloads()  # torch 2.8 and later


@dataclass(frozen=True)
class GradientFactors(ABC):
    """The gradients of one parameter for each example of a batch, not multiplied out.

    Fields that are tensors have one row per example.
    """

    @property
    def batch(self) -> int:
        """Number of examples."""
        return len(getattr(self, fields(self)[0].name))

    @abstractmethod
    def dense(self) -> Tensor:
        """Return the gradients, ``[batch, *parameter.shape]``, in float32 or float64."""

    def __getitem__(self, examples: slice) -> Self:
        """Return the factors of some of the examples."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{n: x[examples] for n, x in own.items() if isinstance(x, Tensor)})


@dataclass(frozen=True)
class Dense(GradientFactors):
    """A gradient already formed, ``[batch, *parameter.shape]``."""

    gradient: Tensor

    def dense(self) -> Tensor:
        """Return a copy, so that callers may change the result in place."""
        return wide(self.gradient).clone()


@dataclass(frozen=True)
class Outer(GradientFactors):
    """A sum of outer products over positions, the gradient of a ``Linear`` weight.

    ``g[b] = Σ_p output_gradient[b, p] ⊗ input[b, p]``
    """

    output_gradient: Tensor  # [batch, positions, out]
    input: Tensor  # [batch, positions, in]

    def dense(self) -> Tensor:
        """Return ``[batch, out, in]``.

        In half precision a GPU multiplies on tensor cores and sums in float32, which is exact up
        to the order of the sum.
        """
        d, a = self.output_gradient, self.input
        if d.is_cuda and d.dtype == a.dtype and d.dtype in _HALF and _SUMS_WIDE:
            return torch.bmm(d.transpose(1, 2), a, out_dtype=torch.float32)
        return torch.bmm(wide(d).transpose(1, 2), wide(a))


@dataclass(frozen=True)
class Correlation(GradientFactors):
    """The gradient of a convolution's weight (1, 2 or 3 dimensions, transposed or not)."""

    output_gradient: Tensor  # [batch, out, *positions]
    input: Tensor  # [batch, in, *positions], already padded unless the padding is zeros
    layer: nn.modules.conv._ConvNd
    padding: tuple[int, ...]

    # Up to this many output positions, one batched product of unfolded patches is faster than
    # torch's convolution backward for each example (measured on two CPU cores, 8² against 32²).
    UNFOLD_POSITIONS = 256

    def dense(self) -> Tensor:
        """Return ``[batch, *weight.shape]``."""
        layer, shape = self.layer, self.layer.weight.shape
        outer = self.as_outer() if self.output_gradient.is_cuda else None
        if outer is not None:  # one batched product, summed in a fixed order
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

        None for convolutions with groups and for transposed ones, where this does not hold.
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
        """Return the output padding of a transposed convolution in this call.

        It can differ from the layer's setting: ``layer(x, output_size=...)`` overrides that.
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


@dataclass(frozen=True)
class Rows(GradientFactors):
    """The gradient of an ``Embedding``: output gradients added at the looked-up rows."""

    output_gradient: Tensor  # [batch, positions, width]
    index: Tensor  # [batch, positions], integer
    rows: int

    def dense(self) -> Tensor:
        """Return ``[batch, rows, width]``."""
        d = wide(self.output_gradient)
        gradients = d.new_zeros(len(d), self.rows, d.shape[-1])
        if d.is_cuda:  # in a fixed order
            example = torch.arange(len(d), device=d.device)[:, None]
            return gradients.index_put_((example, self.index), d, accumulate=True)
        return gradients.scatter_add_(1, self.index[..., None].expand_as(d), d)


@dataclass(frozen=True)
class Sum(GradientFactors):
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

    def __getitem__(self, examples: slice) -> Self:
        """Return the factors of some of the examples."""
        return type(self)([part[examples] for part in self.parts])


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is float64: sums over positions need this."""
    return x.to(wide_dtype(x))


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which sums of x are computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
