"""The scale of scores: the typical score, and the share of candidates that score less."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.search.scan import row_factors, scores_of_rows
from dmin.store import Store

STREAMED = 1024  # scores that are kept of a stream of all
READ = 128  # rows that are read where an index spares reading all


class Answer(NamedTuple):
    """The answer for a batch of queries: the k best, and the scale of their scores.

    Args:
        scores: float32 ``[Q, k]``, best first.
        rows: int64 ``[Q, k]``.
        parts: what timesteps and groups add, ``[Q, k, T, G]``, or None.
        at_least: candidates with an equal or better score, int64 ``[Q, k]``.
        typical: median of the candidates' scores, ``[Q]``; None of a part of them.
        maximum: the best score possible, ``[Q]``, or None.
        sampled: for a part, the scores of its candidates in the sample, ``[Q, n]``.
    """

    scores: Tensor
    rows: Tensor
    parts: Tensor | None
    at_least: Tensor
    typical: Tensor | None
    maximum: Tensor | None
    sampled: Tensor | None = None


class Sample:
    """The scores of some candidates, the same for all queries.

    Args:
        keep: the rows that are candidates, bool ``[N]``; None for all.
        total: N.
        most: how many to sample.
        seed: key of the draw.
        within: restrict the sample to a part, bool ``[N]``; None for all.
    """

    def __init__(
        self,
        keep: np.ndarray | None,
        total: int,
        most: int,
        seed: int = 0,
        within: np.ndarray | None = None,
    ) -> None:
        allowed = None if keep is None else np.flatnonzero(keep)
        count = total if allowed is None else len(allowed)
        drawn = np.random.default_rng(seed).choice(count, min(most, count), False, shuffle=False)
        rows = np.sort(drawn if allowed is None else allowed[drawn])
        self.rows: np.ndarray = rows if within is None else rows[within[rows]]
        self._found: list[Tensor] = []

    def update(self, scores: Tensor, first: int) -> None:
        """Take the scores ``[Q, n]`` of the rows from ``first``."""
        start, end = np.searchsorted(self.rows, [first, first + scores.shape[1]])
        self._found.append(scores[:, self.rows[start:end] - first])

    def read(self, asked: InnerProduct, store: Store) -> None:
        """Score only the rows of the sample."""
        queries = asked.queries.flatten(1).cpu()
        factors = row_factors(store, asked)
        found = scores_of_rows(store, asked, factors, queries, self.rows)
        self._found.append(found.float())

    @property
    def scores(self) -> Tensor:
        """All scores of the sample, ``[Q, n]``."""
        return torch.cat(self._found, dim=1)

    @property
    def median(self) -> Tensor:
        """Of each query's scores, ``[Q]``."""
        return medians(self.scores)


def medians(scores: Tensor) -> Tensor:
    """Return the median of each row, the mean of the middle two for even counts."""
    return torch.from_numpy(np.median(scores.numpy(), axis=1).astype(np.float32))


def at_least(best: Tensor, tied: Tensor) -> Tensor:
    """Return how many of all scores are at least as large as each of the best, int64 ``[Q, k]``.

    Args:
        best: the k largest, descending.
        tied: how many more equal the last of them, ``[Q]``.
    """
    return among(best, best) + tied[:, None].where(best == best[:, -1:], 0)


def among(scores: Tensor, best: Tensor) -> Tensor:
    """Return how many scores of each row ``[Q, n]`` reach each of ``best [Q, k]``."""
    return torch.searchsorted((-scores).sort(dim=1).values, (-best).contiguous(), right=True)


def estimated(sample: Tensor, best: Tensor, candidates: int) -> Tensor:
    """Estimate :func:`at_least` from a sample ``[Q, n]``; at least the number of best ones."""
    share = among(sample, best).double() / sample.shape[1]
    found = torch.maximum((share * candidates).round().long(), among(best, best))
    return found.clamp(max=candidates)


def merged_counts(scores: np.ndarray, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return how many candidates of all parts reach each score, int64 ``[Q, K]``.

    Args:
        scores: of the whole, descending, ``[Q, K]``.
        parts: the best scores ``[Q, k]`` of each part, descending, and their own counts. No part
            omits a score above its last one that is among the best of all.
    """
    total = np.zeros(scores.shape, np.int64)
    for best, counts in parts:
        padded = np.pad(counts, ((0, 0), (1, 0)))
        places = among(torch.from_numpy(best), torch.from_numpy(scores)).numpy()
        total += np.take_along_axis(padded, places, axis=1)
    return total
