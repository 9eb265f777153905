"""Terms of the variance bounds of sketches."""

from math import prod
from typing import NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """Terms of the bounds for pairs of matrices G, H ``[n, out, in]``; each ``[n]``."""

    whole: Tensor  # ‖G‖²‖H‖² + ⟨G, H⟩²
    along: Tensor  # ‖GᵀH‖²
    across: Tensor  # ‖GHᵀ‖²
    trace: Tensor  # tr (GᵀH)² = tr (GHᵀ)²


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a parameter's shape as a matrix: outputs × (inputs · kernel taps)."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def whole(g: Tensor, h: Tensor) -> Tensor:
    """Return ``‖g‖²‖h‖² + ⟨g, h⟩²`` of pairs of gradients ``[n, *shape]``."""
    g, h = g.reshape(len(g), -1), h.reshape(len(h), -1)
    return g.square().sum(1) * h.square().sum(1) + (g * h).sum(1).square()


def moments(g: Tensor, h: Tensor) -> Moments:
    """Return the moments of pairs of gradients ``[n, *shape]``, viewed as matrices."""
    shape = matrix_shape(tuple(g.shape[1:]))
    left, right = g.reshape(-1, *shape), h.reshape(-1, *shape)
    turned = shape[0] > shape[1]  # products over the shorter side suffice
    if turned:
        left, right = left.transpose(1, 2), right.transpose(1, 2)
    between = left @ right.transpose(1, 2)
    own = (left @ left.transpose(1, 2)) * (right @ right.transpose(1, 2))
    short, long = own.sum((1, 2)), between.square().sum((1, 2))
    along, across = (long, short) if turned else (short, long)
    trace = (between * between.transpose(1, 2)).sum((1, 2))
    return Moments(whole(g, h), along, across, trace)


def share_of_equal(size: int, dim: int) -> float:
    """Return the probability that two of ``size`` spread words are equal modulo ``dim``."""
    rounded = 1 << (size - 1).bit_length()
    return max(0.0, rounded / dim - 1) / max(1, rounded - 1)
