"""Scores that are one inner product with a stored row, and how the rows are prepared for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock

Scale = Literal["unit", "norm", "none"]


@dataclass(frozen=True)
class InnerProduct:
    """Queries whose scores are inner products with scaled rows of the store.

    ``I(q, i) = Σ_{d,t} c_{d,t}(i) ⟨q_{d,t}, x_{d,t}(i)⟩``, x the stored rows.

    Such scores are computed at memory bandwidth, and an index can search them.

    Args:
        queries: q, float32 ``[Q, D, T, G, k]``, including weights and all other factors of the
            queries.
        scale: c. ``unit`` scales every row to length 1, ``norm`` to the norm of its gradient,
            ``none`` is 1.
        readout: which rows.
    """

    queries: Tensor
    scale: Scale = "none"
    readout: str = "loss"

    def scores(self, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        rows = scaled_rows(train, self.scale, self.readout)
        queries = self.queries
        if queries.stride()[1:3] == (0, 0):  # the same everywhere: the rows are added up first
            queries, rows = queries[:, 0, 0], rows.sum((1, 2))
        return queries.flatten(1) @ rows.flatten(1).T

    def times(self, sign: int) -> InnerProduct:
        """Return the queries, multiplied by a sign."""
        return replace(self, queries=sign * self.queries)

    def bound(self) -> Tensor | None:
        """Return the largest size a score can have, ``[Q]``; None where rows have any length.

        By Cauchy and Schwarz: unit rows that point where the query does. Of a sum of cosines it is
        the sum of the weights.
        """
        return self.queries.flatten(3).norm(dim=3).sum((1, 2)) if self.scale == "unit" else None

    def timesteps(self, train: ExampleBlock) -> Tensor:
        """Return what each timestep adds, ``[Q, n, T]``."""
        rows = scaled_rows(train, self.scale, self.readout)
        return torch.einsum("qdtm,ndtm->qnt", self.queries.flatten(3), rows.flatten(3))

    def contributions(self, train: ExampleBlock) -> Tensor:
        """Return what each group of layers adds at each timestep, ``[Q, n, T, G]``."""
        rows = scaled_rows(train, self.scale, self.readout)
        return torch.einsum("qdtgk,ndtgk->qntg", self.queries, rows)


def scaled_rows(block: ExampleBlock, scale: Scale, readout: str = "loss") -> Tensor:
    """Return the rows of a block, scaled as :class:`InnerProduct` has it, ``[n, D, T, G, k]``.

    Rows of a store are of unit length over all groups, up to the sketch's error; the norms of
    their groups are those of the gradient.
    """
    rows = block.features[readout]
    if scale == "unit":
        return torch.nn.functional.normalize(rows.flatten(3), dim=-1).view_as(rows)
    if scale == "norm":
        return rows * block.norms[readout].square().sum(-1).sqrt()[..., None, None]
    return rows


def summed_rows(block: ExampleBlock, readout: str = "loss") -> Tensor:
    """Return the gradients summed over draws and timesteps, ``[n, G, k]``."""
    length = block.norms[readout].square().sum(-1).sqrt()  # [n, D, T]
    return torch.einsum("ndt,ndtgk->ngk", length, block.features[readout])


def with_summed_rows(vectors: Tensor, queries: ExampleBlock, readout: str = "loss") -> InnerProduct:
    """Return inner products with :func:`summed_rows` as inner products with the stored rows.

    Args:
        vectors: one for each query, ``[Q, G·k]`` or ``[Q, G, k]``.
        queries: that they were computed from.
        readout: which rows.
    """
    draws, steps, groups, dim = queries.features[readout].shape[1:]
    rows = vectors.view(-1, 1, 1, groups, dim).expand(-1, draws, steps, -1, -1)
    return InnerProduct(rows, "norm", readout)
