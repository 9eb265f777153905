"""Retrieval metrics, one number for each query, and their means with intervals."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from dmin.runtime.errors import DminError

# Hall's correction of a larger skewness makes intervals far longer, but the skewness of few values
# is hardly known. Limited to this, they cover almost as often (experiments/coverage/intervals.csv).
SKEWNESS = 0.4


class Estimate(NamedTuple):
    """A mean over queries and its 95 % interval."""

    mean: float
    low: float
    high: float


def measure(name: str, scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Return a metric for each query.

    Examples are ranked by descending score; for equal scores, the metric is its mean over all
    orders of them (McSherry & Najork, ECIR 2008), so that no row is favoured. r_j is 1 if the j-th
    example is relevant, else 0, and R is the number of relevant examples:

    - ``precision@k`` = Σ_{j≤k} r_j / k
    - ``recall@k`` = Σ_{j≤k} r_j / R
    - ``mAP``: Σ_j r_j · precision@j / R
    - ``MRR``: 1 / (rank of the first relevant one)

    Args:
        name: of the metric.
        scores: float ``[queries, examples]``.
        relevant: bool ``[queries, examples]``, at least one True per row.

    Returns:
        float64 ``[queries]``.

    Raises:
        DminError: unknown metric, k out of range, NaN scores, or a query without relevant examples.
    """
    if np.isnan(scores).any():
        raise DminError(
            f"{int(np.isnan(scores).sum())} scores are NaN, so the examples cannot be ranked."
        )
    if not relevant.any(axis=1).all():
        query = int(np.argmin(relevant.any(axis=1)))
        raise DminError(f"query number {query} has no relevant example in the training store.")
    kind, _, at = name.partition("@")
    if kind in ("precision", "recall") and at.isdigit():
        k = int(at)
        if not 1 <= k <= scores.shape[1]:
            raise DminError(
                f"{name}: there are {scores.shape[1]} training examples. Choose metrics with k of "
                f"at most {scores.shape[1]} in the `metrics` of this ground truth."
            )
        each = (_hits(*row, k) for row in _ties(scores, relevant))
        return np.array([*each]) / (k if kind == "precision" else relevant.sum(axis=1))
    if name not in ("mAP", "MRR"):
        raise DminError(f"metric {name!r}: allowed are precision@k, recall@k, mAP, MRR.")
    of = _average_precision if name == "mAP" else _reciprocal_rank
    return np.array([of(*row) for row in _ties(scores, relevant)])


def _ties(scores: np.ndarray, relevant: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each query the counts of examples and of relevant ones per score, best first."""
    for row, right in zip(scores, relevant, strict=True):
        _, tie, counts = np.unique(-row, return_inverse=True, return_counts=True)
        yield counts, np.bincount(tie, weights=right, minlength=len(counts))


def _hits(counts: np.ndarray, right: np.ndarray, k: int) -> float:
    """Return the mean number of relevant examples among the first k."""
    before = np.cumsum(counts) - counts
    return float((right * np.clip((k - before) / counts, 0, 1)).sum())


def _average_precision(counts: np.ndarray, right: np.ndarray) -> float:
    """Return the mean average precision over all orders of equal scores."""
    tie = np.repeat(np.arange(len(counts)), counts)  # of each place
    ranks = np.arange(1, len(tie) + 1)
    within = ranks - 1 - (np.cumsum(counts) - counts)[tie]  # places before it in its tie
    above = (np.cumsum(right) - right)[tie]
    share, others = (right / counts)[tie], (right - 1)[tie] / np.maximum(counts - 1, 1)[tie]
    return float((share * (above + within * others + 1) / ranks).sum() / right.sum())


def _reciprocal_rank(counts: np.ndarray, right: np.ndarray) -> float:
    """Return the mean of 1 / rank of the first relevant one over all orders of equal scores."""
    tie = int(np.argmax(right > 0))
    n, r, before = int(counts[tie]), int(right[tie]), int(counts[:tie].sum())
    place = np.arange(n - r + 1)  # irrelevant examples of the tie before the first relevant one
    wrong_so_far = np.cumprod(np.concatenate([[1.0], (n - r - place[:-1]) / (n - place[:-1])]))
    return float((wrong_so_far * r / (n - place) / (before + place + 1)).sum())


def within_bounds(metric: str, value: float) -> float:
    """Return a value of a metric, or the least or largest value that the metric can have."""
    if metric in ("mAP", "MRR", "AUROC") or metric.startswith(("precision@", "recall@")):
        return min(max(value, 0.0), 1.0)
    return min(max(value, -1.0), 1.0) if metric == "LDS" or metric.endswith("ρ") else value


def bootstrap(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return the mean over queries with its 95 % interval.

    Args:
        values: ``[queries]``.
        resamples: number of bootstrap resamples of the queries.
        seed: of the resamples.
    """
    return interval(values.mean(), resampled_means(values, resamples, seed), len(values))


def interval(center: float, resampled: np.ndarray, clusters: int) -> Estimate:
    """Return a value with its 95 % interval from bootstrap resamples.

    ``center − s · h(±t)``, s the resamples' standard deviation times √(n/(n − 1)), t of Student
    with n − 1 degrees of freedom, and h Hall's correction of their skewness λ, ``h(t) = 3/λ ((1 +
    λ(t − λ/6))^⅓ − 1)`` (Hall 1992, "On the removal of skewness by transformation"), with λ
    within ±:data:`SKEWNESS`. Percentile intervals cover too little for few or skewed values
    (experiments/coverage/intervals.csv).

    Args:
        center: the value.
        resampled: ``[R]``.
        clusters: n, the number of units drawn with replacement: queries, or groups of them.
    """
    deviation = resampled - resampled.mean()
    spread = float(np.sqrt(np.square(deviation).mean()))
    if clusters < 2 or spread <= 1e-12 * abs(center):
        return Estimate(float(center), float(center), float(center))
    skew = float(np.clip((deviation**3).mean() / spread**3, -SKEWNESS, SKEWNESS))
    reach = float(student.ppf(0.975, clusters - 1))
    spread *= math.sqrt(clusters / (clusters - 1))

    def corrected(t: float) -> float:
        return t if abs(skew) < 1e-6 else 3 / skew * (np.cbrt(1 + skew * (t - skew / 6)) - 1)

    low, high = (float(center - spread * corrected(t)) for t in (reach, -reach))
    return Estimate(float(center), low, high)


def resampled_means(values: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Return the means of ``count`` bootstrap resamples of the values, ``[R]``."""
    drawn = np.random.default_rng(seed).integers(len(values), size=(count, len(values)))
    return np.asarray(values[drawn].mean(axis=1))
