"""Diversity of the answers: do scores look at the query at all?"""

from dataclasses import dataclass

import numpy as np

from dmin.evaluation.controls import top_only
from dmin.evaluation.truths.base import Array, GroundTruth, Measures
from dmin.runtime.errors import DminError


@dataclass(eq=False)
class Diversity(GroundTruth):
    """Do scores depend on the query at all? It compares scores with each other, not with truth.

    ``rank correlation``: mean rank correlation of a query's scores with those of other queries; 1
    if the scores do not depend on the query. ``distinct@k``: its mean over queries is the number of
    distinct examples in all top k, divided by ``Q · k``.

    Args:
        k: number of examples in a query's top.
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

    It is 1 if scores do not depend on the query, 0 for unrelated rankings.

    Raises:
        DminError: there is only one query.
    """
    if len(scores) < 2:
        raise DminError("popularity compares queries: give two or more.")
    ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
    correlation = np.asarray(np.corrcoef(ranks))
    return np.asarray((correlation.sum(1) - 1) / (len(scores) - 1))


def shared_top(scores: Array, k: int) -> Array:
    """Return each query's share of distinct examples in its top k, ``[Q]``.

    An example in the top k of n queries counts 1/n for each. So the mean over queries is the number
    of distinct examples divided by ``Q · k``.
    """
    kept = top_only(scores, k)
    return np.asarray((kept / np.maximum(kept.sum(0), 1)).sum(1) / k)
