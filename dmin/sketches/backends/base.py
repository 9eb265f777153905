"""The interface of a backend, and the rows that it accumulates into."""

from dataclasses import dataclass
from typing import Protocol, TypeGuard

from torch import Tensor, nn

from dmin.gradients.factors import Correlation, GradientFactors, Outer, Rows as LookedUp
from dmin.sketches.maps import Map, TensorSketchMap


@dataclass(frozen=True, eq=False)
class GroupRows:
    """The rows of one group of parameters; both tensors are changed in place."""

    values: Tensor  # [batch, k]
    squared_norm: Tensor | None  # [batch]; None if norms of gradients are not needed


class Backend(Protocol):
    """Evaluates maps for one pass over a batch. The sketch family alone defines the map."""

    def fold(self, factors: GradientFactors, map_: Map, rows: GroupRows) -> None:
        """Add the folded gradients of one parameter to rows, and their squared norms.

        Gradients of small parameters may be kept and added in batches, at the latest in `finish`.
        """

    def add_spectra(
        self, factors: GradientFactors, map_: TensorSketchMap, spectrum: Tensor
    ) -> None:
        """Add ``Σ_p F(C₁ d_p) ∘ F(C₂ a_p)`` over positions p of one layer call.

        Args:
            factors: outer products ``Σ_p d_p ⊗ a_p``, or a correlation in one or two dimensions.
            map_: the TensorSketch, with count sketches C₁ and C₂.
            spectrum: complex ``[batch, k // 2 + 1]``, changed in place.
        """

    def scatter(self, gradient: Tensor, bucket: Tensor, sign: Tensor, values: Tensor) -> None:
        """Add signed gradients ``[n, P]`` at buckets ``[P]`` to values ``[n, k]``."""

    def finish(self) -> None:
        """Add the gradients that were kept."""


def in_positions(factors: GradientFactors) -> TypeGuard[Outer | Correlation]:
    """Return whether gradients are sums of outer products over positions, for every backend.

    These are outer products, and correlations in one or two dimensions with a single group.
    """
    if isinstance(factors, Correlation):
        return type(factors.layer) in (nn.Conv1d, nn.Conv2d) and factors.layer.groups == 1
    return isinstance(factors, Outer)


def positions_of(factors: GradientFactors) -> int:
    """Return the number of positions: a gradient is a sum of one outer product per position."""
    assert isinstance(factors, Outer | LookedUp | Correlation)
    d = factors.output_gradient
    return d[0, 0].numel() if isinstance(factors, Correlation) else d.shape[1]
