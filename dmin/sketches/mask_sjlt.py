"""Mask, then fold: only a random subset of the gradient's scalars is used."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from dmin.gradients.factors import GradientFactors, Outer, Sum, wide_dtype
from dmin.runtime.errors import DminError
from dmin.sketches.backends.torch import add_at
from dmin.sketches.base import Accumulator, Sketch, Sketched
from dmin.sketches.hashing import hash_words, key, signs


class MaskSJLT(Sketch):
    """Keep each scalar with probability q = keep / P, scale by q^-½, then sign and fold to k.

    ``(S g)[c] = q^-½ Σ_{j kept} s_j g_j [ h_j = c ]`` (GraSS, Hu et al., arXiv 2505.18976:
    a mask, then a sparse projection). It is unbiased over mask, signs and hashes, with

    ``Var⟨S g, S h⟩ ≤ (‖g‖²‖h‖² + ⟨g, h⟩²) / k + (1/q − 1) Σ_j g_j² h_j²``.

    For gradients spread evenly over P scalars the last term is only about ``‖g‖²‖h‖² / keep``.
    For gradients concentrated on a few scalars it dominates. The kept entries of a Linear layer's
    gradient are computed from its factors. Positions are drawn by their gaps, so that work and
    memory are proportional to ``keep``, not to P. Norms are those of the sketch.

    Args:
        dim: k.
        seed: key of positions, hashes and signs.
        keep: expected number of scalars kept of the whole model (at most all).
    """

    family = "mask_sjlt"
    norm_kind = "sketch"
    folds: int | None = 1

    def __init__(self, dim: int = 4096, seed: int = 0, keep: int = 1 << 16) -> None:
        super().__init__(dim, seed)
        if keep < dim:
            raise DminError(
                f"sketch.keep={keep} with sketch.dim={dim}: fewer scalars are kept than the "
                f"sketch has dimensions. Set sketch.keep to at least {dim}; eight times as many "
                f"are usual."
            )
        self.keep = keep

    def describe(self) -> dict[str, Any]:
        """Return the settings that define the map."""
        return {**super().describe(), "keep": self.keep}

    def variance(self, name: str, g: Tensor, h: Tensor) -> Tensor:
        """Return the stated bound, ``[n]``; see the base class."""
        q = min(1.0, self.keep / self.parameters.count)
        common = (g * h).reshape(len(g), -1).square().sum(1)
        return super().variance(name, g, h) + (1 / q - 1) * common

    def add(self, state: Accumulator, name: str, factors: GradientFactors) -> None:
        """Add the kept scalars of one parameter."""
        parameter = self.parameters.by_name[name]
        values = state.values[:, parameter.group]
        size, q = prod(parameter.shape), min(1.0, self.keep / self.parameters.count)
        places = self._kept_places(name, size, q, values.device)
        bucket = hash_words(key(self.seed, name, "offset"), len(places), values.device) % self.dim
        sign = signs(key(self.seed, name, "sign"), len(places), values.device) * q**-0.5
        outer = [part for part in _parts(factors) if isinstance(part, Outer)]
        positions = max((part.input.shape[1] for part in outer), default=1)
        bytes_each = values.element_size() * max(len(places) * positions, size)
        step = max(1, state.budget // max(1, bytes_each))
        for start in range(0, factors.batch, step):
            examples = slice(start, start + step)
            kept = entries(factors[examples], places, parameter.shape)
            add_at(values[examples], bucket, kept.to(values.dtype) * sign.to(values.dtype))

    def finish(self, state: Accumulator) -> Sketched:
        """Return the finished rows and their norms."""
        return Sketched(state.values, state.values.square().sum(-1))

    def _kept_places(self, name: str, size: int, q: float, device: torch.device) -> Tensor:
        """Return the kept positions, cached for each device (8 bytes each)."""
        if (name, device) not in self._kept:
            places = kept_places(key(self.seed, name, "kept"), size, q)
            self._kept[name, device] = places.to(device)
        return self._kept[name, device]


def kept_places(key: int, size: int, q: float) -> Tensor:
    """Return sorted positions in [0, size), each with probability q, from geometric gaps.

    They are drawn on the CPU, hence equal everywhere. Work is proportional to their number.
    """
    if q >= 1:
        return torch.arange(size)
    count = int(q * size + 6 * (q * size) ** 0.5) + 16
    while True:
        uniform = (hash_words(key, count).double() + 0.5) / 2**32
        gaps = torch.log(uniform).div_(torch.log1p(torch.tensor(-q, dtype=torch.float64)))
        places = gaps.floor_().long().add_(1).cumsum(0).sub_(1)
        if places[-1] >= size:
            return places[places < size]
        count *= 2  # a longer part of the same sequence: earlier gaps are unchanged


def entries(factors: GradientFactors, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return some entries of each example's flattened gradient, ``[batch, len(places)]``.

    They are computed from a Linear layer's factors, ``Σ_p d_p[o] a_p[i]``, where that is cheaper.
    """
    parts = _parts(factors)
    if len(parts) > 1:
        return torch.stack([entries(part, places, shape) for part in parts]).sum(0)
    (part,) = parts
    if not isinstance(part, Outer) or 2 * len(places) > prod(shape):
        return part.dense().reshape(part.batch, -1)[:, places]
    d, a = part.output_gradient, part.input
    wide = wide_dtype(d)
    rows, columns = places // shape[1], places % shape[1]
    return torch.einsum("bpj,bpj->bj", d[..., rows].to(wide), a[..., columns].to(wide))


def _parts(factors: GradientFactors) -> list[GradientFactors]:
    return list(factors.parts) if isinstance(factors, Sum) else [factors]
