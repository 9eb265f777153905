"""What an attribution method is: queries and training examples in, a score for each pair out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.store import Layout


@dataclass(frozen=True)
class InnerProduct:
    """Scores that are one inner product with scaled rows of the store, each query's own vector.

    ``I(q, i) = Σ_{d,t} c_{d,t}(i) ⟨q_{d,t}, x_{d,t}(i)⟩``, x the rows as they are stored.

    Args:
        queries: q, float32 ``[Q, D, T, G, k]``; weights and what else belongs to queries included.
        scale: c. ``unit`` brings every row to length 1, ``norm`` to its gradient's, ``none`` is 1.
        readout: which rows.
    """

    queries: Tensor
    scale: Literal["unit", "norm", "none"] = "none"
    readout: str = "loss"


class Method(ABC):
    """Scores every pair of a query and a training example; a larger score is more influence.

    Scores must not depend on how the training side is cut into blocks.
    """

    name: str
    requires = Requires()

    def fit(self, train: FeatureSet) -> None:  # noqa: B027 (most methods learn nothing)
        """Look at the whole training side once, before any score."""

    def transform_query(self, queries: ExampleBlock) -> Any:
        """Prepare the queries once; what it returns is handed to :meth:`score`."""
        return queries

    @abstractmethod
    def score(self, queries: Any, train: ExampleBlock) -> Tensor:
        """Return the scores ``[queries, n]`` of a block of n training examples."""

    def contributions(self, queries: Any, train: ExampleBlock) -> Tensor | None:
        """Return what each timestep adds, ``[queries, n, T]``, or None if they do not add up."""
        return None

    def group_contributions(
        self, queries: Any, train: ExampleBlock, layout: Layout
    ) -> Tensor | None:
        """Return what each group of layers adds at each timestep, or None if nobody can say.

        A score that is one inner product (:meth:`linear`) is the sum of what its groups have. Where
        an inner product ``u = Σ_g u_g`` is raised to a power, a group has the share ``u_g / u`` of
        that: its Aumann–Shapley value, what it adds while all groups grow in step from nothing
        (Aumann & Shapley, "Values of Non-Atomic Games", 1974); of a square this is its Shapley
        value as well. Shares add up to the score; one is negative where a group works against the
        others.

        Args:
            queries: what :meth:`transform_query` returned.
            train: the examples.
            layout: of the stores.

        Returns:
            ``[queries, n, T, G]``.
        """
        linear = self.linear(queries, layout)
        if linear is None:
            return None
        rows, scale = train.features[linear.readout], linear.scale
        if scale == "unit":
            rows = torch.nn.functional.normalize(rows.flatten(3), dim=-1).view_as(rows)
        elif scale == "norm":
            length = train.norms[linear.readout].square().sum(-1).sqrt()
            rows = rows * length[..., None, None]
        return torch.einsum("qdtgk,ndtgk->qntg", linear.queries, rows)

    def notes(self) -> dict[str, str]:
        """Return what fitting found that a reader of the scores should know, by topic."""
        return {}

    def linear(self, queries: Any, layout: Layout) -> InnerProduct | None:
        """Return the scores as one inner product, or None if they are not.

        A method that has this is scanned at the speed of memory and can be searched by an index;
        it must agree with :meth:`score`.

        Args:
            queries: what :meth:`transform_query` returned.
            layout: of the stores.
        """
        return None


def in_row_order(queries: Tensor, layout: Layout) -> Tensor:
    """Return query vectors ``[Q, T, D·G·k]``, scaled by 1/√D, as ``[Q, D, T, G, k]``, by 1/D.

    Averages over the draws are 1/√D on both sides for a method; rows of the store have no share.
    """
    draws, times, groups, dim = layout.row_shape
    rows = queries.view(len(queries), times, draws, groups, dim) / draws**0.5
    return rows.transpose(1, 2)
