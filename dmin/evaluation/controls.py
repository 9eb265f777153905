"""What a score owes to its shape alone: the controls beside every table.

Squaring scores or keeping the best few lifts LDS without knowing anything more, and a score that
is the same for every query can still foretell losses. Each function takes scores ``[Q, N]``.
"""

from __future__ import annotations

import numpy as np

from dmin.runtime.errors import DminError

Array = np.ndarray


def squared(scores: Array) -> Array:
    """Return the squares of scores above each query's lowest: the same order, heavier top."""
    return (scores - scores.min(1, keepdims=True)) ** 2


def soft_max(scores: Array, temperature: float = 1.0) -> Array:
    """Return the soft-max over examples of each query's z-scores: the same order.

    Args:
        scores: ``[Q, N]``.
        temperature: z-scores are divided by it.
    """
    spread = scores.std(1, keepdims=True)
    z = (scores - scores.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1) / temperature
    weight = np.exp(z - z.max(1, keepdims=True))
    return weight / weight.sum(1, keepdims=True)


def top_only(scores: Array, k: int) -> Array:
    """Return 1 for each query's k best and 0 for all others; equal ones by row.

    Raises:
        DminError: k is out of range.
    """
    if not 1 <= k <= scores.shape[1]:
        raise DminError(f"top_only: k={k}, of {scores.shape[1]} examples.")
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    kept = np.zeros(scores.shape)
    np.put_along_axis(kept, order, 1.0, axis=1)
    return kept


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
