"""Maps evaluated by plain torch operations on any device: the reference for the other backends."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from dmin.gradients.factors import Correlation, GradientFactors, Outer
from dmin.sketches.backends.base import GroupRows, positions_of
from dmin.sketches.maps import Map, TensorSketchMap


class TorchBackend:
    """Forms gradients of as many examples as the budget allows, and adds entries to buckets.

    Args:
        budget: most bytes of per-example gradients in memory at once.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def fold(self, factors: GradientFactors, map_: Map, rows: GroupRows) -> None:
        """Form the gradients and scatter them."""
        bucket, sign = map_.buckets(rows.values.device)

        def project(gradient: Tensor, values: Tensor) -> None:
            self.scatter(gradient, bucket, sign, values)

        project_formed(factors, prod(map_.shape), rows, self.budget, project)

    def scatter(self, gradient: Tensor, bucket: Tensor, sign: Tensor, values: Tensor) -> None:
        """Add signed gradients at buckets."""
        add_at(values, bucket, gradient * sign.to(gradient.dtype))

    def add_spectra(
        self, factors: GradientFactors, map_: TensorSketchMap, spectrum: Tensor
    ) -> None:
        """Count-sketch, transform and multiply as many positions at a time as the budget allows."""
        row, column = map_.sides(spectrum.device)
        positions, wide = positions_of(factors), spectrum.real.dtype
        # A position needs memory for two count sketches and two spectra, each of k dimensions.
        rows = max(1, self.budget // (4 * map_.dim * wide.itemsize))
        step = min(positions, rows)
        for first in range(0, factors.batch, max(1, rows // step)):
            examples = slice(first, first + max(1, rows // step))
            some = factors[examples]
            outer = some.as_outer() if isinstance(some, Correlation) else some
            assert isinstance(outer, Outer)
            for start in range(0, positions, step):
                d = outer.output_gradient[:, start : start + step].to(wide)
                a = outer.input[:, start : start + step].to(wide)
                left = torch.fft.rfft(_counted(d, *row, map_.dim))
                right = torch.fft.rfft(_counted(a, *column, map_.dim))
                spectrum[examples] += left.mul_(right).sum(1)

    def finish(self) -> None:
        """Do nothing: no gradients were kept."""


def project_formed(
    factors: GradientFactors,
    size: int,
    rows: GroupRows,
    budget: int,
    project: Callable[[Tensor, Tensor], None],
) -> None:
    """Form gradients, add their squared norms, and project them, a few examples at a time.

    The budget limits the gradients in memory; at least one example's are formed. Small slices also
    stay in the cache, which saves most of the time.

    Args:
        factors: the gradients.
        size: P, number of scalars of the parameter.
        rows: the rows to which the results are added.
        budget: most bytes of gradients in memory at once.
        project: adds the sketches of gradients ``[n, P]``, which it may overwrite, to ``[n, k]``.
    """
    dtype = rows.values.dtype
    step = max(1, budget // max(1, size * dtype.itemsize))
    for start in range(0, factors.batch, step):
        examples = slice(start, start + step)
        gradient = factors[examples].dense().to(dtype).reshape(-1, size)
        if rows.squared_norm is not None:
            norms = torch.linalg.vector_norm(gradient, dim=1).square_()
            rows.squared_norm[examples] += norms
        project(gradient, rows.values[examples])
        del gradient  # free this slice before the next one is formed


def add_at(rows: Tensor, bucket: Tensor, values: Tensor) -> None:
    """Add values ``[n, P]`` at buckets ``[P]`` to rows ``[n, k]``, in a fixed order.

    On a GPU ``index_add_`` adds in the order in which threads run, while ``index_put_`` sorts.
    """
    if rows.is_cuda:
        folded = rows.new_zeros(rows.shape[1], len(rows))
        rows += folded.index_put_((bucket.long(),), values.T, accumulate=True).T
    else:
        rows.index_add_(1, bucket, values)


def _counted(x: Tensor, bucket: Tensor, sign: Tensor, dim: int) -> Tensor:
    """Return the count sketches of x ``[batch, positions, n]``, ``[batch, positions, k]``."""
    counted = x.new_zeros(*x.shape[:-1], dim)
    add_at(counted.view(-1, dim), bucket, (x * sign.to(x.dtype)).flatten(0, -2))
    return counted
