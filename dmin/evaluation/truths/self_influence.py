"""Ground truth of self-influence: do marked examples have the highest scores with themselves?"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dmin.attribution import FeatureSet
from dmin.evaluation.context import BenchmarkContext
from dmin.evaluation.truths.base import Array, GroundTruth, Measures
from dmin.runtime.errors import DminError


@dataclass(eq=False)
class SelfInfluence(GroundTruth):
    """Do examples marked by a column, such as mislabelled ones, have the highest self-influence?

    ``AUROC = P(τ(i, i) > τ(j, j))`` for a marked i and an unmarked j; ties count half. It is the
    mean over marked examples of the fraction of unmarked ones below (Pruthi et al. 2020, section
    4.1). The loss of each example is a reference that needs no gradient.

    Args:
        column: of the metadata; an example that has it (and not false or null) is marked.
        sample: unmarked examples that the marked ones are compared with, evenly spread.
    """

    column: str = "mislabelled"
    sample: int = 250
    of = "self"

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Find the marked examples.

        Raises:
            DminError: none or all are marked.
        """
        train = context.train.store
        is_marked = np.array([bool(row.get(self.column)) for row in train.metadata])
        marked, others = np.flatnonzero(is_marked), np.flatnonzero(~is_marked)
        if not len(marked) or not len(others):
            raise DminError(
                f"{len(marked)} of {len(is_marked)} training examples have {self.column!r} in "
                f"their metadata; self-influence compares examples with and without it, so both "
                f"are needed."
            )
        step = max(1, len(others) // self.sample)
        self.rows = np.concatenate([marked, others[::step][: self.sample]])
        self._marked = is_marked[self.rows]
        self._losses = train.losses().mean((1, 2))[self.rows]

    def measure(self, scores: Array) -> Measures:
        """Return the fraction of unmarked examples that score below each marked one."""
        marked, others = scores[self._marked, None], scores[None, ~self._marked]
        return {"AUROC": ((marked > others) + 0.5 * (marked == others)).mean(1)}

    def references(self) -> Mapping[str, Measures]:
        """Return the AUROC of the loss."""
        return {"training loss": self.measure(self._losses)}
