"""Two-sided projection: both factors of a layer's gradient projected, then multiplied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt, prod
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from dmin.gradients.factors import Correlation, GradientFactors, Outer, Rows, Sum
from dmin.gradients.parameters import Parameter
from dmin.sketches.backends.base import positions_of
from dmin.sketches.base import Accumulator, Sketch, Sketched
from dmin.sketches.bounds import matrix_shape, moments
from dmin.sketches.hashing import hash_words, key, signs

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Factored(Sketch):
    """``S G = vec(A G Bᵀ)`` for each parameter as a matrix G, summed over all parameters.

    The entries of ``A [k₁, out]`` and ``B [k₂, in]`` are random signs divided by √k₁ and √k₂, with
    k₁·k₂ = k, independent for each parameter. This is LoGra's projection (Choe et al., arXiv
    2405.13954), which keeps the layers separate; the sum over layers is several times more accurate
    at equal k. A gradient ``Σ_p d_p ⊗ a_p`` becomes ``Σ_p A d_p ⊗ B a_p`` and is never formed; for
    convolutions ``B a_p`` is itself a convolution of the input with k₂ kernels. A kernel is viewed
    as a matrix of out × (in · height · width), a vector as a single column.

    k₁ and k₂ are the divisors of k nearest to √k. A side no longer than its k₁ or k₂ is kept whole
    (random signs and a random cyclic shift), and the other side gets the remaining factor of k.

    It is unbiased. For one parameter, with M = GᵀH, N = GHᵀ, ρ = ⟨G, H⟩, τ = tr M² = tr N²,

    ``Var ≤ (‖G‖²‖H‖² + ρ² + ‖M‖² + ‖N‖²)/k + (‖M‖² + τ)/k₂ + (‖N‖² + τ)/k₁``,

    without the term of a side that is kept whole. A vector longer than k is count-sketched (one
    sign and one of k buckets per entry), which has only the first term. Between parameters
    ``(‖g‖²‖h‖² + ⟨g, h⟩²)/k`` holds, as for the other sketches. The terms in 1/k₁ and 1/k₂ are the
    drawback: they fall only with √k, and for rank-one gradients ‖M‖ and ‖N‖ are as large as ‖G‖‖H‖.

    Norms are those of the sketch. Rows cannot be folded to a smaller k.

    Args:
        dim: k; a power of two splits best.
        seed: key of all A and B.
    """

    family = "factored"
    norm_kind = "sketch"
    revision = 2  # vectors longer than k are count-sketched

    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Add one parameter, from its factors where that is cheaper than forming the gradient."""
        parameter = self.parameters.by_name[name]
        rows = state.values[:, parameter.group]
        left, right = self.sides(parameter, rows)
        plan = self._plan(parameter)
        for part in factors.parts if isinstance(factors, Sum) else [factors]:
            step = max(1, state.budget // max(1, _bytes(part, parameter, left.to + right.to)))
            for start in range(0, part.batch, step):
                examples = slice(start, start + step)
                product = _projected(part[examples], left, right, parameter, plan, rows.dtype)
                rows[examples] += product.flatten(1)

    def finish(self, state: Accumulator) -> Sketched:
        """Return the finished rows and their norms."""
        return Sketched(state.values, state.values.square().sum(-1))

    def variance(self, name: str, g: Tensor, h: Tensor) -> Tensor:
        """Return the stated bound, ``[n]``; see the base class."""
        parameter = self.parameters.by_name[name]
        shares, found = self.shares(parameter), moments(g, h)
        sizes = matrix_shape(parameter.shape)
        left, right = (size > share for size, share in zip(sizes, shares, strict=True))
        pairs = found.whole + (found.along + found.across if left and right else 0)
        rows = (found.along + found.trace) / shares[1] if right else 0
        columns = (found.across + found.trace) / shares[0] if left else 0
        return pairs / self.dim + rows + columns

    def shares(self, parameter: Parameter) -> tuple[int, int]:
        """Return k₁ and k₂, with k₁ · k₂ = k."""
        out, inside = matrix_shape(parameter.shape)
        divisors = [d for d in range(1, isqrt(self.dim) + 1) if self.dim % d == 0]
        divisors += [self.dim // d for d in reversed(divisors)]
        first = max(d for d in divisors if d <= isqrt(self.dim))
        if out <= first:
            first = min(d for d in divisors if d >= out)
        elif inside <= self.dim // first:
            first = self.dim // min(d for d in divisors if d >= inside)
        return first, self.dim // first

    def sides(self, parameter: Parameter, like: Tensor) -> tuple[AxisMap, AxisMap]:
        """Return A and B of one parameter, hashed anew at each call."""
        plan = self._plan(parameter)
        each = zip(*plan, strict=True)
        left, right = (self._side(*side, like) for side in each)
        return left, right

    def _side(
        self, size: int, share: int, keys: tuple[int, int], matrix: bool, like: Tensor
    ) -> AxisMap:
        if matrix:
            entries = signs(keys[0], share * size, like.device).to(like.dtype) * share**-0.5
            return AxisMap(share, entries.view(share, size))
        sign = signs(keys[0], size, like.device).to(like.dtype)
        if size <= share:
            shift = int(hash_words(keys[1], 1)) % share
            bucket = (torch.arange(size, device=like.device) + shift) % share
        else:
            bucket = hash_words(keys[1], size, like.device) % share
        return AxisMap(share, sign, bucket)

    def _plan(self, parameter: Parameter) -> _Plan:
        """Return the cached sizes, shares, keys and kinds of map of a parameter's two sides."""
        if parameter.name not in self._kept:
            sizes, shares = matrix_shape(parameter.shape), self.shares(parameter)
            keys, matrices = [], []
            for side, size, share in zip(("out", "in"), sizes, shares, strict=True):
                name = self.seed, parameter.name, side
                place = "shift" if size <= share else "place"
                keys.append((key(*name, "sign"), key(*name, place)))
                matrices.append(size > share and 1 not in sizes)
            self._kept[parameter.name] = _Plan(sizes, shares, tuple(keys), tuple(matrices))
        return self._kept[parameter.name]


class _Plan(NamedTuple):
    """The maps of a parameter's two sides, (outputs, inputs)."""

    sizes: tuple[int, int]
    shares: tuple[int, int]  # k₁, k₂
    keys: tuple[tuple[int, int], ...]  # of the signs and the buckets of each side
    matrices: tuple[bool, ...]  # True: a matrix of signs; False: one sign and bucket per entry


@dataclass(frozen=True)
class AxisMap:
    """A random map of one side of a gradient: signs and buckets, or a matrix of signs."""

    to: int
    sign: Tensor  # [size], or [to, size] multiplied by to^-½
    bucket: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Map the last dimension to ``to`` entries."""
        if self.bucket is None:
            return x @ self.sign.T
        return x.new_zeros(*x.shape[:-1], self.to).index_add_(-1, self.bucket, x * self.sign)

    @property
    def matrix(self) -> Tensor:
        """The map as a matrix, ``[to, size]``."""
        if self.bucket is None:
            return self.sign
        full = self.sign.new_zeros(self.to, len(self.sign))
        full[self.bucket, torch.arange(len(self.sign), device=full.device)] = self.sign
        return full


def _projected(
    part: GradientFactors,
    left: AxisMap,
    right: AxisMap,
    parameter: Parameter,
    plan: _Plan,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``A G Bᵀ``, ``[batch, k₁, k₂]``."""
    if isinstance(part, Rows):
        d = left.matrix.T[part.index]  # A times a one-hot vector
        return d.transpose(1, 2) @ right(part.output_gradient.to(dtype))
    if not _projects(part, right) or _forming_is_cheaper(part, plan):
        formed = part.dense().to(dtype).reshape(-1, *matrix_shape(parameter.shape))
        return left(right(formed).transpose(1, 2)).transpose(1, 2)
    if isinstance(part, Outer):
        d, a = left(part.output_gradient.to(dtype)), right(part.input.to(dtype))
        return d.transpose(1, 2) @ a
    kernels = right.matrix.view(-1, *parameter.shape[1:])
    convolve = _CONVOLUTIONS[part.input.ndim - 2]
    settings = part.layer.stride, part.padding, part.layer.dilation
    a = convolve(part.input.to(dtype), kernels, None, *settings).flatten(2)  # [b, k₂, p]
    d = left(part.output_gradient.to(dtype).flatten(2).transpose(1, 2))  # [b, p, k₁]
    return (a @ d).transpose(1, 2)


def _forming_is_cheaper(part: Outer | Correlation, plan: _Plan) -> bool:
    """Return whether forming a gradient is cheaper than projecting its factors."""
    (out, inside), (first, second), positions = plan.sizes, plan.shares, positions_of(part)
    # Multiplications with one column of A and of B.
    of_left, of_right = (n * m for n, m in zip(plan.shares, plan.matrices, strict=True))
    projected = positions * (out * of_left + inside * of_right + first * second)
    formed = out * (positions * inside + inside * of_right + of_left * second)
    return formed < projected


def _projects(part: GradientFactors, right: AxisMap) -> TypeGuard[Outer | Correlation]:
    """Return whether torch can project a layer call's factors.

    For a convolution, B must be a matrix, so that its rows can be used as kernels.
    """
    if isinstance(part, Correlation):
        return not (part.layer.groups > 1 or part.layer.transposed or right.bucket is not None)
    return isinstance(part, Outer)


def _bytes(part: GradientFactors, parameter: Parameter, shares: int) -> int:
    """Return roughly the bytes that projecting one example takes."""
    if isinstance(part, Outer | Rows | Correlation):
        return 4 * max(positions_of(part) * shares, prod(parameter.shape))
    return 4 * prod(parameter.shape)
