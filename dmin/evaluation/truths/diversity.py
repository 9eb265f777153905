"""Diversity of the answers: do scores look at the query at all?"""

from dataclasses import dataclass

import numpy as np

from dmin.evaluation.controls import top_only
from dmin.evaluation.truths.base import Array, GroundTruth, Measures
from dmin.runtime.errors import DminError


@dataclass(eq=False)
class Diversity(GroundTruth):
    """What scores are like, whatever is true: do they look at the query at all?

    ``rank correlation`` of a query's scores with the other queries', mean: 1 for mere popularity.
    ``distinct@k``: its mean over queries is the number of distinct examples in all top k, over
    ``Q · k``.

    Args:
        k: of the top.
    """

    k: int = 10

    def measure(self, scores: Array) -> Measures:
        """Return both for each query."""
        return {
            "rank correlation": rank_correlations(scores),
            f"distinct@{self.k}": shared_top(scores, self.k),
        }


def rank_correlations(scores: Array) -> Array:
    """Return the mean rank correlation of each query's scores with those of the others, ``[Q]``.

    1 for a score that does not look at the query, 0 for unrelated rankings.

    Raises:
        DminError: there is one query only.
    """
    if len(scores) < 2:
        raise DminError("popularity compares queries: give two or more.")
    ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
    correlation = np.asarray(np.corrcoef(ranks))
    return np.asarray((correlation.sum(1) - 1) / (len(scores) - 1))


def shared_top(scores: Array, k: int) -> Array:
    """Return each query's part in the distinct examples among all queries' top k, ``[Q]``.

    An example that n queries name counts 1/n for each; so the mean over queries is the number of
    distinct examples over ``Q · k``.
    """
    kept = top_only(scores, k)
    return np.asarray((kept / np.maximum(kept.sum(0), 1)).sum(1) / k)
