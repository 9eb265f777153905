"""Retrieval metrics, one number a query, and their means with intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dmin.runtime.errors import DminError


class Estimate(NamedTuple):
    """A mean over queries and its 95 % interval."""

    mean: float
    low: float
    high: float


def measure(name: str, scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Return a metric for each query.

    Examples are ranked by descending score, equal ones by row. With r_j whether the j-th is right
    and R the number of right ones:

    - ``precision@k`` = Σ_{j≤k} r_j / k
    - ``recall@k`` = Σ_{j≤k} r_j / R
    - ``mAP``: Σ_j r_j · precision@j / R
    - ``MRR``: 1 / (rank of the first right one)

    Args:
        name: of the metric.
        scores: float ``[queries, examples]``.
        relevant: bool ``[queries, examples]``, at least one True a row.

    Returns:
        float64 ``[queries]``.

    Raises:
        DminError: unknown metric, k out of range, a NaN score, or a query with no right answer.
    """
    if np.isnan(scores).any():
        raise DminError(f"{int(np.isnan(scores).sum())} scores are NaN, so they cannot be ranked.")
    if not relevant.any(axis=1).all():
        query = int(np.argmin(relevant.any(axis=1)))
        raise DminError(f"query number {query} has no right answer in the training store.")
    order = np.argsort(-scores, axis=1, kind="stable")
    right = np.take_along_axis(relevant, order, axis=1).astype(np.float64)
    kind, _, at = name.partition("@")
    if kind in ("precision", "recall") and at.isdigit():
        k = int(at)
        if not 1 <= k <= scores.shape[1]:
            raise DminError(
                f"{name}: there are {scores.shape[1]} training examples. Name metrics of the first "
                f"{scores.shape[1]} or fewer in the `metrics` of this ground truth."
            )
        hits = right[:, :k].sum(axis=1)
        return hits / (k if kind == "precision" else right.sum(axis=1))
    if name == "mAP":
        precision = right.cumsum(axis=1) / np.arange(1, right.shape[1] + 1)
        return (precision * right).sum(axis=1) / right.sum(axis=1)
    if name == "MRR":
        return 1 / (1 + right.argmax(axis=1))
    raise DminError(f"metric {name!r}: allowed are precision@k, recall@k, mAP, MRR.")


def bootstrap(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return the mean of values, one a query, with a percentile bootstrap interval of 95 %.

    Args:
        values: ``[queries]``.
        resamples: draws of that many queries with replacement.
        seed: key of the draws.
    """
    return interval(values.mean(), resampled_means(values, resamples, seed))


def interval(center: float, resampled: np.ndarray) -> Estimate:
    """Return a value with the 95 % percentile interval of its resamples."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(center), float(low), float(high))


def resampled_means(values: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Return the means of ``count`` draws of that many values with replacement, ``[R]``."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(count, len(values)))
    return np.asarray(values[drawn].mean(axis=1))
