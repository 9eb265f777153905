"""Controls for the shape of scores: monotone transforms that add no information.

Squaring scores or keeping only the best few raises LDS without any further knowledge. Each function
takes scores ``[Q, N]``.
"""

import numpy as np

from dmin.evaluation.report.results import TRANSFORMED
from dmin.runtime.errors import DminError

Array = np.ndarray


def transformed(scores: Array) -> dict[str, Array]:
    """Return monotone transforms of scores; changes of LDS are due to the scores' shape alone."""
    few = max(1, round(0.05 * scores.shape[1]))
    changed = squared(scores), soft_max(scores), top_only(scores, few)
    return dict(zip(TRANSFORMED, changed, strict=True))


def squared(scores: Array) -> Array:
    """Return ``(score − lowest of the query)²``: the same order, with heavier top scores."""
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
    """Return 1 for each query's k best and 0 for all others; ties are broken by row.

    Raises:
        DminError: k is out of range.
    """
    if not 1 <= k <= scores.shape[1]:
        raise DminError(f"top_only: k={k}, of {scores.shape[1]} examples.")
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    kept = np.zeros(scores.shape)
    np.put_along_axis(kept, order, 1.0, axis=1)
    return kept
