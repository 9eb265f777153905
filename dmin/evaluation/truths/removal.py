"""Counterfactual removal: retrain without the examples a method names, and see what it costs."""

from __future__ import annotations

import numpy as np

from dmin.evaluation.metrics import Estimate, bootstrap
from dmin.runtime.errors import DminError

Array = np.ndarray


def without_top(scores: Array, k: int) -> list[Array]:
    """Return, for each query, all examples but its k of largest score; equal ones by row.

    Args:
        scores: ``[Q, N]``.
        k: how many to remove.

    Raises:
        DminError: that would leave nothing, or remove nothing.
    """
    _check(k, scores.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")
    return [np.sort(row[k:]) for row in order]


def without_union(scores: Array, k: int) -> Array:
    """Return all examples but the k named first by the queries taken together.

    Queries take turns: each names its next best until k are found. One retrained model then
    answers for many queries.

    Args:
        scores: ``[Q, N]``.
        k: how many to remove.

    Raises:
        DminError: that would leave nothing, or remove nothing.
    """
    _check(k, scores.shape[1])
    turns = np.argsort(-scores, axis=1, kind="stable").T.ravel()
    _, first = np.unique(turns, return_index=True)
    return np.setdiff1d(np.arange(scores.shape[1]), turns[np.sort(first)[:k]])


def without_random(examples: int, k: int, count: int, seed: int = 0) -> list[Array]:
    """Return all examples but k random ones, several times.

    Raises:
        DminError: that would leave nothing, or remove nothing.
    """
    _check(k, examples)
    generator = np.random.default_rng(seed)
    return [np.sort(generator.permutation(examples)[k:]) for _ in range(count)]


def rise(removed: Array, random: Array) -> Array:
    """Return by how many percent each query's loss rises over that without random examples.

    Args:
        removed: loss of each query by the model trained without its examples, ``[Q]``.
        random: losses by the models trained without random ones, ``[models, Q]``.

    Returns:
        ``[Q]``, in percent.
    """
    return 100 * (removed / random.mean(0) - 1)


def mean_rise(removed: Array, random: Array) -> Estimate:
    """Return the mean of :func:`rise` with its interval over queries."""
    return bootstrap(rise(removed, random))


def _check(k: int, examples: int) -> None:
    if not 1 <= k < examples:
        raise DminError(f"removal of k={k}: choose 1 … {examples - 1}, of {examples} examples.")
