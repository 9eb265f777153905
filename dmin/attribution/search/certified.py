"""Certified search: a small index proposes, exact rows decide, a bound says when that is proven."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.search.certified_bound import ProjectionIndex, kind_of
from dmin.attribution.search.index import Found, Index
from dmin.attribution.search.scan import best_of_all, row_factors, scores_of_rows
from dmin.attribution.search.threads import in_threads
from dmin.runtime.errors import DminError
from dmin.store import Store

FIRST = 64  # rows read before anything is known of the threshold
MOST = 8192  # rows read at a time, later
SCAN_FROM = 0.25  # of the rows: more candidates than this are quicker scanned than read one by one
TOGETHER = 8  # queries whose bounds are in memory at once
WORTH = 0.5  # of a scan: where the queries that are left would read more, they are scanned together


class Certified(Index):
    """Exact search that reads only the rows that could be among the best.

    Args:
        directions: numbers an example that are kept with the store and in memory, a byte each.

    Raises:
        DminError: no direction.
    """

    def __init__(self, directions: int = 256) -> None:
        if directions < 1:
            raise DminError(f"index.directions={directions}: an index needs 1 direction or more.")
        self.directions = directions
        self._index: ProjectionIndex | None = None
        self._read: list[np.ndarray] = []

    def search(
        self,
        linear: InnerProduct,
        store: Store,
        k: int,
        sign: int = 1,
        keep: np.ndarray | None = None,
    ) -> Found:
        """Return the k best, see :func:`certified_search`; the index is kept with the store."""
        if self._index is None or self._index.kind != kind_of(store, linear):
            self._index = ProjectionIndex.of(store, linear, self.directions)
        found = certified_search(linear, store, self._index, k, sign, keep)
        self._read.append(found.read / len(store))
        return found

    def note(self) -> str:
        """Say what was read for the proof."""
        parts = np.concatenate(self._read)
        proven = parts[parts < 1]
        part = f"{100 * proven.mean():.2g} % of the rows read for a query" if len(proven) else ""
        scanned = len(parts) - len(proven)
        rest = f"{scanned} of {len(parts)} queries by reading all" if scanned else ""
        return "proven, " + ", ".join(filter(None, (part, rest)))


def certified_search(
    linear: InnerProduct,
    store: Store,
    index: ProjectionIndex,
    k: int,
    sign: int = 1,
    keep: np.ndarray | None = None,
) -> Found:
    """Return the k rows of largest ``sign · score``, reading only those that could be among them.

    Rows are read in the order of their upper bounds (:meth:`ProjectionIndex.bounds`) until the next
    one is below the k-th best score read: what is not read cannot be among the best. Equal scores
    are ordered by row, as in a scan. Queries whose bounds exclude too little are scanned together,
    and so are many queries, of which a scan reads less than their proofs would.
    Arguments are those of :meth:`Index.search`.

    Raises:
        DminError: the index is of other rows.
    """
    _check(linear, store, index)
    queries = sign * linear.queries.flatten(1).cpu()
    out = None if keep is None else ~torch.from_numpy(keep)
    factors = row_factors(store, linear)
    found = [_Best(query, store, linear, factors, k) for query in queries]
    for start in range(0, len(found), TOGETHER):
        fresh, asked = found[start : start + TOGETHER], queries[start : start + TOGETHER]
        bounds = index.bounds(asked)
        if out is not None:
            bounds[:, out] = -torch.inf
        work = list(zip(fresh, bounds, strict=True))
        if len(work) == 1:  # then its rows are shared out over the threads
            fresh[0].prove(bounds[0])
        else:
            for _ in in_threads(lambda pair: pair[0].prove(pair[1]), work):
                pass
        part = np.mean([len(best.rows_read) for best in fresh]) / len(store)
        codes = index.codes.shape[1] / store.layout.row_bytes
        if (len(found) - start - len(fresh)) * (part + codes) > WORTH:
            break
    read = np.array([len(best.rows_read) for best in found])
    answers = [(best.scores, best.rows, best.tied) for best in found]
    unproven = [number for number, best in enumerate(found) if not best.proven]
    if unproven:  # those that were not begun as well
        read[unproven] = len(store)
        replaced = InnerProduct(sign * linear.queries[unproven], linear.scale, linear.readout)
        best = best_of_all(replaced, store, k, keep)
        scanned = zip(best.scores, best.rows, best.tied, strict=True)
        for number, answer in zip(unproven, scanned, strict=True):
            answers[number] = answer
    scores, rows, tied = (torch.stack(part) for part in zip(*answers, strict=True))
    return Found(sign * scores, rows, read, tied)


class _Best:
    """The best rows of one query among those read so far."""

    def __init__(
        self, query: Tensor, store: Store, linear: InnerProduct, factors: Tensor | None, k: int
    ) -> None:
        self.query, self.store, self.linear, self.k = query, store, linear, k
        self.factors = factors
        self.rows = self.rows_read = torch.empty(0, dtype=torch.int64)
        self.scores = self._scores_read = torch.empty(0)
        self.proven = False

    def prove(self, bounds: Tensor) -> None:
        """Read rows until no other can be among the best; give up where that takes too many."""
        first = bounds.topk(min(max(FIRST, 4 * self.k), int((bounds > -torch.inf).sum()))).indices
        self._read(first)
        bounds[self.rows_read] = -torch.inf
        left = (bounds >= self.threshold).nonzero()[:, 0]
        left = left[bounds[left] > -torch.inf]
        if len(left) > max(SCAN_FROM * len(bounds), MOST):
            return
        left = left[bounds[left].argsort(descending=True)]
        step = 4 * FIRST
        while len(left):
            self._read(left[:step])
            # The next bounds are all smaller: what is open now is a beginning of what was.
            left = left[step:]
            left = left[bounds[left] >= self.threshold]
            step = min(4 * step, MOST)
        self.proven = True

    @property
    def threshold(self) -> Tensor:
        """The k-th best score read."""
        return self.scores[-1]

    @property
    def tied(self) -> Tensor:
        """How many rows read score as much as the last of the best, and are none of them."""
        last = self.scores[-1:]  # none yet of queries that were not begun
        return (self._scores_read == last).sum() - (self.scores == last).sum()

    def _read(self, rows: Tensor) -> None:
        read = scores_of_rows(self.store, self.linear, self.factors, self.query, rows.numpy())
        scores = torch.cat([self._scores_read, read])
        self.rows_read, order = torch.cat([self.rows_read, rows]).sort()
        self._scores_read = scores[order]
        best = self._scores_read.argsort(descending=True, stable=True)[: self.k]
        self.scores, self.rows = self._scores_read[best], self.rows_read[best]


def _check(linear: InnerProduct, store: Store, index: ProjectionIndex) -> None:
    mine = kind_of(store, linear)
    if mine != index.kind:
        raise DminError(f"This index is of {index.kind}; the search needs {mine}: build it again.")
