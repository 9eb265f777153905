"""Merge rankings by several machines, each of a part of the training examples, into one."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from dmin.attribution.ranking import Ranking
from dmin.attribution.scale import merged_counts
from dmin.runtime.errors import DminError


def merged(parts: Sequence[Ranking], k: int, min_score: float | None = None) -> Ranking:
    """Return the k best of all parts; equal scores are ordered by row.

    Args:
        parts: with the same queries, method and order, over disjoint training rows.
        k: examples per query.
        min_score: see :class:`Ranking`.

    Raises:
        DminError: the parts answer different questions, or ``min_score`` leaves nothing.
    """
    first = parts[0]
    if any(_question(each) != _question(first) for each in parts):
        raise DminError(
            "These rankings answer different questions: only parts of one ranking can be merged."
        )
    sign = 1 if first.order == "proponents" else -1
    rows = np.concatenate([each.train_rows for each in parts], axis=1)
    scores = np.concatenate([each.scores for each in parts], axis=1)
    best = np.lexsort((rows, -sign * scores), axis=1)[:, :k]
    if min_score is not None:
        chosen = np.take_along_axis(scores, best, axis=1)
        best = best[:, : enough_of(chosen, sign, min_score)]

    def named(kind: str) -> list[list[Any]]:
        of_parts = zip(*(getattr(each, kind) for each in parts), strict=True)
        of_queries = [list(chain.from_iterable(lists)) for lists in of_parts]
        return [[all_[i] for i in order] for all_, order in zip(of_queries, best, strict=True)]

    def split(kind: str) -> np.ndarray | None:
        arrays = [getattr(each, kind) for each in parts]
        if arrays[0] is None:
            return None
        return np.take_along_axis(np.concatenate(arrays, axis=1), best[..., None], axis=1)

    best_scores = np.take_along_axis(scores, best, axis=1)
    counted = [(sign * p.scores, p.at_least) for p in parts if p.at_least is not None]
    known = len(counted) == len(parts)
    whole = [each.sampled for each in parts if each.sampled is not None]
    drawn = np.concatenate(whole, axis=1) if len(whole) == len(parts) else None
    sampled = [each.sample for each in parts if each.sample is not None]
    return replace(
        first,
        candidates=sum(each.candidates or 0 for each in parts) or None,
        at_least=merged_counts(sign * best_scores, counted) if known else None,
        sample=min(sampled, default=None),
        typical=None if drawn is None else np.median(drawn, axis=1),
        sampled=None,
        train_rows=np.take_along_axis(rows, best, axis=1),
        train_ids=named("train_ids"),
        train_metadata=named("train_metadata"),
        scores=best_scores,
        contributions=split("contributions"),
        group_contributions=split("group_contributions"),
        min_score=min_score,
    )


def enough_of(scores: np.ndarray, sign: int, min_score: float) -> int:
    """Return the largest number of scores that any query keeps.

    Args:
        scores: float32 ``[Q, k]``, best first.
        sign: −1 where the smallest are best.
        min_score: what an answer must reach.

    Raises:
        DminError: none of them does.
    """
    strongest = sign * scores
    enough = int((strongest >= np.float32(min_score)).sum(1).max())
    if not enough:
        raise DminError(
            f"min_score={min_score:g} leaves no example for any query: the strongest score is "
            f"{sign * strongest.max():.6g}."
        )
    return enough


def _question(ranking: Ranking) -> tuple[object, ...]:
    return ranking.method, ranking.timesteps, ranking.query_ids, ranking.order, ranking.groups
