"""The best of a stream of scores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FEW = 16  # queries that are updated one by one


class TopK:
    """The k largest of a stream of scores for each query; of equal ones the first.

    Args:
        queries: number of queries.
        k: how many to keep.

    Attributes:
        scores: float32 ``[queries, ≤ k]``, descending.
        rows: int64 ``[queries, ≤ k]``.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.scores = torch.empty(queries, 0)
        self.rows = torch.empty(queries, 0, dtype=torch.int64)

    def update(self, scores: Tensor, first: int) -> None:
        """Take the scores ``[queries, n]`` of the rows from ``first``; rows come in order."""
        if self.scores.shape[1] < self.k:
            self.scores, self.rows = self._joined(self.scores, self.rows, scores.float(), first)
            return
        # Most blocks have nothing for most queries: who is only as good comes too late.
        some = (scores.amax(1) > self.scores[:, -1]).nonzero()[:, 0]
        if len(some) > FEW:
            kept = self.scores[some], self.rows[some]
            self.scores[some], self.rows[some] = self._joined(*kept, scores[some].float(), first)
            return
        for query in some.tolist():  # a tenth of the time of the above, where it is small
            best, rows = self.scores[query].numpy(), self.rows[query].numpy()
            mine = scores[query].float().numpy()
            better = np.flatnonzero(mine > best[-1])
            joined = np.concatenate([best, mine[better]])
            order = np.argsort(-joined, kind="stable")[: self.k]
            best[:], rows[:] = joined[order], np.concatenate([rows, better + first])[order]

    def _joined(
        self, scores: Tensor, rows: Tensor, more: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        values, index = stable_topk(more, self.k)
        scores = torch.cat([scores, values], dim=1)
        rows = torch.cat([rows, index + first], dim=1)
        # Kept rows stand before new ones and are smaller: a stable sort keeps ties in row order.
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        return scores.gather(1, order), rows.gather(1, order)


def stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row and their places; of equal ones the first places."""
    k = min(k, scores.shape[1])
    values, index = scores.topk(k, dim=1)
    last = values[:, -1:]
    cut = (scores == last).sum(1) > (values == last).sum(1)  # topk chose among equals as it liked
    if cut.any():
        values[cut], index[cut] = (
            part[:, :k] for part in scores[cut].sort(dim=1, descending=True, stable=True)
        )
    by_row = index.argsort(dim=1)
    values, index = values.gather(1, by_row), index.gather(1, by_row)
    order = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), index.gather(1, order)
