"""The best of a stream of scores."""

import torch
from torch import Tensor


class TopK:
    """The k largest of a stream of scores for each query; of equal ones the first.

    Args:
        queries: number of queries.
        k: how many to keep.

    Attributes:
        scores: float32 ``[queries, ≤ k]``, descending.
        rows: int64 ``[queries, ≤ k]``.
        tied: int64 ``[queries]``, rows not kept with the same score as the last one kept.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.scores: Tensor = torch.empty(queries, 0)
        self.rows: Tensor = torch.empty(queries, 0, dtype=torch.int64)
        self.tied: Tensor = torch.zeros(queries, dtype=torch.int64)

    def update(self, scores: Tensor, first: int) -> None:
        """Take the scores ``[queries, n]`` of the rows from ``first``; rows come in order."""
        if self.scores.shape[1] < self.k:
            whole = torch.arange(len(scores))
            found = self._joined(whole, scores.float(), first)
            self.scores, self.rows, self.tied = found
            return
        # Most blocks have nothing for most queries: who is only as good comes too late.
        largest = scores.amax(1)
        for query in (largest == self.scores[:, -1]).nonzero()[:, 0].tolist():
            self.tied[query] += (scores[query] == largest[query]).sum()
        some = (largest > self.scores[:, -1]).nonzero()[:, 0]
        if len(some):
            found = self._joined(some, scores[some].float(), first)
            self.scores[some], self.rows[some], self.tied[some] = found

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, rows and how many more tie."""
        return self.scores, self.rows, self.tied

    def _joined(self, some: Tensor, more: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Merge scores, rows and ties of some queries with more of their scores."""
        values, index = stable_topk(more, self.k)
        scores = torch.cat([self.scores[some], values], dim=1)
        rows = torch.cat([self.rows[some], index + first], dim=1)
        # Kept rows stand before new ones and are smaller: a stable sort keeps ties in row order.
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        best = scores.gather(1, order)
        last = best[:, -1:]
        old = self.scores[some]
        before = self.tied[some].where((old[:, -1:] == last).any(1), 0)
        tied = before + (old == last).sum(1) + (more == last).sum(1) - (best == last).sum(1)
        return best, rows.gather(1, order), tied


def stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row and their indices; of equal ones the first."""
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
