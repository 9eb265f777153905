"""Exact retrieval: stream the training side past all queries at once and keep the best."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.base import Method, Side, check_pair
from dmin.attribution.dmin import DMin
from dmin.attribution.ranking import Ranking
from dmin.errors import DminError
from dmin.store import Store


def retrieve(
    queries: Store | Side,
    train: Store | Side,
    method: Method | None = None,
    k: int = 10,
    rows: int = 1024,
) -> Ranking:
    """Return the k training examples of largest score for each query, best first.

    The training store is read once, in blocks, whatever the number of queries; memory does not grow
    with it. Equal scores are ordered by row, so the answer does not depend on the blocks.

    Args:
        queries: features of the queries.
        train: features of the training examples, made with the same model, schedule and sketch.
        method: how to score; :class:`DMin` if none.
        k: examples a query.
        rows: training examples in memory at once.

    Raises:
        DminError: the stores do not belong together, are incomplete, or k is out of range.
    """
    queries, train = _side(queries), _side(train)
    method = method or DMin()
    check_pair(queries, train, method)
    if not 1 <= k <= len(train):
        raise DminError(f"k={k}: choose 1 … {len(train)}, the number of training examples.")
    method.fit(train)
    asked = method.transform_query(queries.block(np.arange(len(queries)), method.requires))
    best = TopK(len(queries), k)
    for block in train.blocks(method.requires, rows):
        best.update(method.score(asked, block), block.first)
    return _ranking(queries, train, method, best)


def score_matrix(
    queries: Store | Side, train: Store | Side, method: Method, rows: int = 1024
) -> np.ndarray:
    """Return every score, float32 ``[queries, examples]``; arguments as in :func:`retrieve`."""
    queries, train = _side(queries), _side(train)
    check_pair(queries, train, method)
    method.fit(train)
    asked = method.transform_query(queries.block(np.arange(len(queries)), method.requires))
    scores = [method.score(asked, block) for block in train.blocks(method.requires, rows)]
    return torch.cat(scores, dim=1).numpy().astype(np.float32)


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
        values, index = _stable_topk(scores.float(), self.k)
        scores = torch.cat([self.scores, values], dim=1)
        rows = torch.cat([self.rows, index + first], dim=1)
        # Kept rows stand before new ones and are smaller: a stable sort keeps ties in row order.
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        self.scores, self.rows = scores.gather(1, order), rows.gather(1, order)


def _stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
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


def _ranking(queries: Side, train: Side, method: Method, best: TopK) -> Ranking:
    ids, metadata = train.store.ids, train.store.metadata
    rows = best.rows.tolist()
    return Ranking(
        method=method.name,
        timesteps=train.store.layout.timesteps,
        query_ids=list(queries.store.ids),
        query_metadata=list(queries.store.metadata),
        train_rows=best.rows.numpy(),
        train_ids=[[ids[row] for row in each] for each in rows],
        train_metadata=[[metadata[row] for row in each] for each in rows],
        scores=best.scores.numpy(),
        contributions=_contributions(queries, train, method, best.rows.numpy()),
    )


def _contributions(
    queries: Side, train: Side, method: Method, rows: np.ndarray
) -> np.ndarray | None:
    """Read the winners once more and split their scores by timestep, ``[Q, k, T]``."""
    parts = []
    for query, winners in enumerate(rows):
        asked = method.transform_query(queries.block([query], method.requires))
        split = method.contributions(asked, train.block(winners, method.requires))
        if split is None:
            return None
        parts.append(split[0].numpy())
    return np.stack(parts)


def _side(side: Store | Side) -> Side:
    return side if isinstance(side, Side) else Side(side)
