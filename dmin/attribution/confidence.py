"""How sure one answer is: an error bar for each score, and how firmly each holds its place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dmin.attribution.features import FeatureSet
from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.method import Method
from dmin.attribution.ranking import Ranking
from dmin.attribution.search.scan import gathered_rows

Array = np.ndarray
SURE = 1.96  # standard deviations: two scores that differ by more are distinguished, at 95 %


def with_confidence(
    ranking: Ranking,
    queries: FeatureSet,
    train: FeatureSet,
    method: Method,
    k: int,
    resamples: int = 400,
    seed: int = 0,
) -> Ranking:
    """Return the first k of a ranking, each with an error bar and the stability of its place.

    A score is a sum over draws (t, ε) of timestep and noise, ``I(i) = Σ_t Σ_d c_{td}(i)``, the same
    draws for all examples. They are drawn again, together for all examples: with D ≥ 2 draws of
    noise those of each timestep (its variance times D/(D − 1), as few draws spread too little);
    with one the timesteps, which is more than their even spacing would vary. To each goes the error
    of a sketch of re-normalised rows, ``(1 − ρ²)² / k`` a cosine ρ (Li & Li 2023, OPORP, theorem
    3.2), where scores are cosines.

    ``error`` is the standard deviation of the score over these resamples; ``stability`` the share
    of them in which the example is among the first k of the candidates. Examples of one of the
    ``tiers`` cannot be distinguished: no two scores of it differ by more than 1.96 standard
    deviations of their difference, which is drawn for both together. All that speaks of
    chance in measuring the score, not of whether the score means influence.

    Args:
        ranking: more than k examples a query, so that others can take their places.
        queries: that it was made for.
        train: likewise.
        method: likewise, fitted.
        k: examples a query to return; all, where the ranking has fewer.
        resamples: how many.
        seed: key of the draws.

    Returns:
        The ranking with ``errors``, ``stability`` and ``tiers``, or without where a method's scores
        are not a sum over timesteps.

    """
    k = min(k, ranking.scores.shape[1])
    generator = np.random.default_rng(seed)
    errors, stability = np.zeros((2, len(ranking.query_ids), k), dtype=np.float32)
    ahead = min(k + 1, ranking.scores.shape[1])  # who comes next may be of the last tier
    tiers = np.zeros((len(ranking.query_ids), ahead), dtype=np.int64)
    for query, rows in enumerate(ranking.train_rows):
        parts, spread = parts_of(queries, train, method, query, rows)
        if parts is None:
            return ranking.first(k)
        scores = ranking.scores[query].astype(np.float64)
        drawn = resampled(scores, parts, spread, resamples, generator)
        errors[query] = drawn.std(0)[:k]
        # The k-th best of each resample: who scores as much is among the first k.
        sign = 1 if ranking.order == "proponents" else -1
        least = np.sort(sign * drawn, axis=1)[:, -k]
        stability[query] = (sign * drawn >= least[:, None]).mean(0)[:k]
        tiers[query] = tiers_of(scores[:ahead], drawn[:, :ahead])
    goes_on, tiers = (tiers[:, k:] == tiers[:, k - 1 : k]).any(1), tiers[:, :k]
    first = ranking.first(k)
    return replace(first, errors=errors, stability=stability, tiers=tiers, tier_goes_on=goes_on)


def tiers_of(scores: Array, drawn: Array) -> Array:
    """Return the tier of each score, int64 ``[n]``: a new one begins where any two differ.

    Args:
        scores: best first, ``[n]``.
        drawn: as they might have come out, ``[resamples, n]``.
    """
    covariance = np.atleast_2d(np.cov(drawn, rowvar=False))
    variance = np.diag(covariance)
    spread = np.sqrt(np.maximum(variance[:, None] + variance - 2 * covariance, 0))
    # Rounding is no difference: copies score alike to the last bits alone.
    apart = np.abs(scores[:, None] - scores) > SURE * spread + 1e-6 * np.abs(scores).max()
    tiers, start = np.zeros(len(scores), dtype=np.int64), 0
    for place in range(1, len(scores)):
        begins = apart[place, start:place].any()
        start = place if begins else start
        tiers[place] = tiers[place - 1] + begins
    return tiers


def resampled(
    scores: Array, parts: Array, spread: Array, count: int, generator: np.random.Generator
) -> Array:
    """Return scores as they might have come out, ``[count, n]``.

    Args:
        scores: ``[n]``.
        parts: what each draw and timestep adds, ``[n, D, T]``.
        spread: standard deviation of the sketch's error in each score, ``[n]``.
        count: resamples.
        generator: of the draws.
    """
    n, draws, steps = parts.shape
    if draws > 1:
        weights = generator.multinomial(draws, np.full(draws, 1 / draws), size=(count, steps))
        changed = np.einsum("ctd,ndt->cn", weights - 1.0, parts) * np.sqrt(draws / (draws - 1))
    else:
        weights = generator.multinomial(steps, np.full(steps, 1 / steps), size=count)
        changed = (weights - 1.0) @ parts[:, 0].T * np.sqrt(steps / max(1, steps - 1))
    return scores + changed + spread * generator.normal(size=(count, n))


def parts_of(
    queries: FeatureSet, train: FeatureSet, method: Method, query: int, rows: Array
) -> tuple[Array | None, Array]:
    """Return what each draw and timestep adds to some scores of a query, and the sketch's error.

    Returns:
        float64 ``[n, D, T]`` (D = 1 where a method does not distinguish draws; None where its
        scores are no sum over timesteps), and ``[n]``, zero where scores are no cosines.
    """
    asked = method.transform_query(queries.block([query], method.requires))
    if not isinstance(asked, InnerProduct):
        found = method.contributions(asked, train.block(rows, method.requires))
        if found is None:
            return None, np.zeros(len(rows))
        return found[0].sum(2).double().numpy()[:, None], np.zeros(len(rows))
    chosen = gathered_rows(train.store, asked, rows)
    parts = torch.einsum("dtgk,ndtgk->ndt", asked.queries[0], chosen).double()
    if asked.scale != "unit":
        return parts.numpy(), np.zeros(len(rows))
    length = asked.queries[0].flatten(2).norm(dim=2).double()  # w_t / D for a plain cosine
    cosine = (parts / length.clamp(min=1e-300)).clamp(-1, 1)
    variance = (length * (1 - cosine**2)).square() / train.store.layout.dim
    return parts.numpy(), variance.sum((1, 2)).sqrt().numpy()
