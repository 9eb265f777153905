"""Certified search: a small index proposes, exact rows decide, a bound says when that is proven."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.base import Linear
from dmin.attribution.search_index import ProjectionIndex
from dmin.attribution.search_scan import gathered_rows, in_threads, scan
from dmin.attribution.search_topk import TopK
from dmin.errors import DminError
from dmin.store import Store

FIRST = 64  # rows read before anything is known of the threshold
MOST = 2048  # rows read at a time, later
SCAN_FROM = 0.25  # of the rows: more candidates than this are quicker scanned than gathered


class Certified(NamedTuple):
    """The k best of each query, proven.

    Args:
        scores: float32 ``[Q, k]``, descending.
        rows: int64 ``[Q, k]``.
        read: rows of the store read exactly, ``[Q]``.
    """

    scores: Tensor
    rows: Tensor
    read: np.ndarray


def certified_search(
    linear: Linear,
    store: Store,
    index: ProjectionIndex,
    k: int,
    sign: int = 1,
    keep: np.ndarray | None = None,
) -> Certified:
    """Return the k rows of largest ``sign · score``, reading only those that could be among them.

    With a = Vᵀq and p = Vᵀz,

    ``|⟨q, z⟩ − ⟨a, p⟩| ≤ ‖q − Va‖ ‖z − Vp‖ + ε ‖q‖ ‖z‖``

    by Cauchy–Schwarz; ε = 8 √m 2⁻²⁴ allows for the rounding of all sums of m terms in float32, of
    the exact scores as well (Higham & Mary 2019, SIAM J. Sci. Comput. 41: √m u with overwhelming
    probability; the store's own rounding has no part: z is what is read back). Rows are read in
    the order of their upper bounds until the next one is below the k-th best score read. Equal
    scores are ordered by row, as in a scan. Queries whose bounds exclude too little are scanned.

    Args:
        linear: the queries, and how rows are scaled.
        store: the rows.
        index: of this store, readout and scale.
        k: rows a query, at most as many as there are (and ``keep`` leaves).
        sign: −1 for the smallest scores.
        keep: bool ``[N]``: the rows allowed.

    Raises:
        DminError: the index is of other rows.
    """
    _check(linear, store, index)
    queries = sign * linear.queries.flatten(1)
    slack = 8 * queries.shape[1] ** 0.5 * 2.0**-24 * index.lengths
    out = None if keep is None else ~torch.from_numpy(keep)

    def prove(query: Tensor) -> tuple[_Best, bool]:
        inside = query @ index.directions
        outside = torch.linalg.vector_norm(query - index.directions @ inside)
        bounds = torch.mv(index.projections, inside)
        bounds.add_(index.residuals * outside).add_(slack * torch.linalg.vector_norm(query))
        if out is not None:
            bounds[out] = -torch.inf
        best = _Best(query, store, linear, k)
        return best, best.prove(bounds)

    found, read, unproven = [], np.zeros(len(queries), dtype=np.int64), []
    for number, (best, proven) in enumerate(in_threads(prove, list(queries))):
        found.append((best.scores, best.rows))
        read[number] = len(best.rows_read)
        if not proven:
            unproven.append(number)
    if unproven:
        read[unproven] = len(store)
        replaced = Linear(sign * linear.queries[unproven], linear.scale, linear.readout)
        for number, each in zip(unproven, _scanned(replaced, store, k, keep), strict=True):
            found[number] = each
    scores, rows = (torch.stack(part) for part in zip(*found, strict=True))
    return Certified(sign * scores, rows, read)


class _Best:
    """The best rows of one query among those read so far."""

    def __init__(self, query: Tensor, store: Store, linear: Linear, k: int) -> None:
        self.query, self.store, self.linear, self.k = query, store, linear, k
        self.rows_read = torch.empty(0, dtype=torch.int64)
        self._scores_read = torch.empty(0)

    def prove(self, bounds: Tensor) -> bool:
        """Read rows until no other can be among the best; give up where that takes too many."""
        first = bounds.topk(min(max(FIRST, 4 * self.k), int((bounds > -torch.inf).sum()))).indices
        self._read(first)
        left = self._open(bounds, torch.ones_like(bounds, dtype=torch.bool))
        if len(left) > max(SCAN_FROM * len(bounds), MOST):
            return False
        left = left[bounds[left].argsort(descending=True)]
        step = FIRST
        while len(left):
            self._read(left[:step])
            # The next bounds are all smaller: what is open now is a beginning of what was.
            left = left[step:]
            left = left[bounds[left] >= self._threshold]
            step = min(2 * step, MOST)
        return True

    def _open(self, bounds: Tensor, possible: Tensor) -> Tensor:
        possible &= bounds >= self._threshold
        possible &= bounds > -torch.inf
        possible[self.rows_read] = False
        return possible.nonzero()[:, 0]

    @property
    def _threshold(self) -> Tensor:
        return self.scores[-1]

    def _read(self, rows: Tensor) -> None:
        vectors = gathered_rows(self.store, self.linear, rows.numpy()).flatten(1)
        read = torch.cat([self.rows_read, rows])
        scores = torch.cat([self._scores_read, vectors @ self.query])
        self.rows_read, order = read.sort()
        self._scores_read = scores[order]
        best = self._scores_read.argsort(descending=True, stable=True)[: self.k]
        self.scores, self.rows = self._scores_read[best], self.rows_read[best]


def _scanned(
    linear: Linear, store: Store, k: int, keep: np.ndarray | None
) -> list[tuple[Tensor, Tensor]]:
    """Return the best by reading everything."""
    best = TopK(len(linear.queries), k)
    for first, scores in scan(linear, store, keep=keep):
        if keep is not None:
            scores[:, ~torch.from_numpy(keep[first : first + scores.shape[1]])] = -torch.inf
        best.update(scores, first)
    return list(zip(best.scores, best.rows, strict=True))


def _check(linear: Linear, store: Store, index: ProjectionIndex) -> None:
    mine = store.fingerprint, linear.readout, linear.scale
    theirs = index.store, index.readout, index.scale
    if mine != theirs:
        raise DminError(
            f"This index is of {theirs[1]!r} rows scaled by {theirs[2]!r} of the store {theirs[0]};"
            f" the search needs {mine[1]!r}, {mine[2]!r}, {mine[0]}: build it again."
        )
