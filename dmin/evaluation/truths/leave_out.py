"""Leave out a whole class or source: does the sum of its scores predict the effect?"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dmin.attribution import FeatureSet
from dmin.evaluation.context import BenchmarkContext
from dmin.evaluation.truths.base import Array, GroundTruth, Measures, column
from dmin.evaluation.truths.lds import ceiling, lds
from dmin.runtime.errors import DminError


@dataclass(eq=False)
class LeaveOut(GroundTruth):
    """Does the sum of scores of each value of a column predict the effect of leaving it out?

    ``E(q, c)`` is the rise of the query's loss when all examples of value c are left out, and
    ``A(q, c) = Σ_{i: c(i) = c} τ(q, i)``. ``leave-out ρ`` is their Spearman correlation over c;
    ``leave-out hit`` is 1 if both are largest for the same c.

    Args:
        column: of the metadata, such as the label or a source.
        seeds: models trained per value.
    """

    column: str = "label"
    seeds: int = 2
    ranks_only = False

    def __post_init__(self) -> None:
        """Refuse too few seeds."""
        if self.seeds < 2:
            raise DminError(f"LeaveOut: seeds={self.seeds}; the ceiling needs two or more.")

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Train models without the examples of each value, with each seed.

        Raises:
            DminError: the column has fewer than three values.
        """
        of = column(context.train.store, self.column)
        values = np.unique(of)
        if len(values) < 3:
            raise DminError(
                f"LeaveOut: {self.column!r} has {len(values)} values among the training examples; "
                f"ranks need three or more. Use removal or LDS instead."
            )
        self._left_out = of[None, :] == values[:, None]  # [C, N]
        subsets = [np.flatnonzero(~row) for row in self._left_out]
        self._losses = np.stack(
            [
                context.retrain(
                    subsets, seed, queries, f"leaving each {self.column} out, {seed + 1}"
                )
                for seed in range(self.seeds)
            ]
        )

    def measure(self, scores: Array) -> Measures:
        """Return the correlation over values, and whether the first one agrees."""
        losses = self._losses.mean(0)  # [C, Q]
        first = (scores @ self._left_out.T).argmax(1) == losses.argmax(0)
        # Leaving helpful examples out raises the loss, so members are those that stay in.
        rank = lds(scores, ~self._left_out, losses)
        return {"leave-out ρ": rank, "leave-out hit": first.astype(np.float64)}

    def references(self) -> Mapping[str, Measures]:
        """Return the ceiling."""
        return {"ceiling": {"leave-out ρ": ceiling(self._losses).attainable}}
