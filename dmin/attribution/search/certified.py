"""Certified search: rows are read in the order of upper bounds until the answer is proven exact."""

from dataclasses import replace

import numpy as np
from torch import Tensor

from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.search.certified_bound import ProjectionIndex, kind_of
from dmin.attribution.search.contenders import (
    Contenders,
    ErrorBound,
    best_of,
    contenders_of_all,
)
from dmin.attribution.search.index import Found, Index, require_count
from dmin.attribution.search.scan import row_factors, scores_of_rows
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
        directions: dimensions of the projections; one byte each for every example, on disk and in
            memory.

    Raises:
        DminError: directions is no whole number of 1 or more.
    """

    def __init__(self, directions: int = 256) -> None:
        require_count("index.directions", directions)
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
        """Return the k best, see :func:`certified_search`; the index is cached with the store."""
        if self._index is None or self._index.kind != kind_of(store, linear):
            self._index = ProjectionIndex.of(store, linear, self.directions)
        found = certified_search(linear, store, self._index, k, sign, keep)
        self._read.append(found.read / len(store))
        return found

    def note(self) -> str:
        """State which share of the rows was read."""
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
        DminError: the index belongs to other rows.
    """
    _check(linear, store, index)
    signed = linear.times(sign)
    queries, bound = signed.queries.flatten(1).cpu(), ErrorBound(signed, store)
    factors = row_factors(store, linear)
    proofs = [_Proof(number, signed, store, factors, bound, k) for number in range(len(queries))]
    for start in range(0, len(proofs), TOGETHER):
        fresh, asked = proofs[start : start + TOGETHER], queries[start : start + TOGETHER]
        bounds = index.bounds(asked)
        if keep is not None:
            bounds[:, ~keep] = -np.inf
        work = list(zip(fresh, bounds, strict=True))
        if len(work) == 1:  # then its rows are shared out over the threads
            fresh[0].prove(bounds[0])
        else:
            for _ in in_threads(lambda pair: pair[0].prove(pair[1]), work):
                pass
        part = np.mean([proof.read for proof in fresh]) / len(store)
        codes = index.codes.shape[1] / store.layout.row_bytes
        if (len(proofs) - start - len(fresh)) * (part + codes) > WORTH:
            break
    read = np.array([proof.read for proof in proofs])
    unproven = [number for number, proof in enumerate(proofs) if not proof.proven]
    found = [proof.found for proof in proofs]
    if unproven:  # those that were not begun as well
        read[unproven] = len(store)
        rest = replace(signed, queries=signed.queries[unproven])
        scanned = contenders_of_all(rest, store, k, keep)
        for number, best in zip(unproven, scanned, strict=True):
            found[number] = best
    scores, rows, tied = best_of(found)
    return Found(sign * scores, rows, read, tied)


class _Proof:
    """The best rows of one query among those read so far, and whether others may be better.

    Args:
        number: index of the query.
        linear: all queries.
        store: the rows.
        factors: of the rows.
        bound: on the error of scores.
        k: number of results.
    """

    def __init__(
        self,
        number: int,
        linear: InnerProduct,
        store: Store,
        factors: Tensor | None,
        bound: ErrorBound,
        k: int,
    ) -> None:
        self._number, self._linear, self._store = number, linear, store
        self._factors, self._bound = factors, bound
        self.found = Contenders(linear.queries[number], linear, store, k)
        self.read, self.proven = 0, False

    def prove(self, bounds: np.ndarray) -> None:
        """Read rows until no other can be among the best; give up if that takes too many.

        Args:
            bounds: upper bounds of the scores, float32 ``[N]``; modified.
        """
        allowed = int((bounds > -np.inf).sum())
        first = np.argpartition(-bounds, at := min(max(FIRST, 4 * self.found.k), allowed) - 1)
        self._read(first[: at + 1])
        bounds[first[: at + 1]] = -np.inf
        left = np.flatnonzero((bounds >= self._threshold) & (bounds > -np.inf))
        if len(left) > max(SCAN_FROM * len(bounds), MOST):
            return
        left = left[np.argsort(-bounds[left])]
        step = 4 * FIRST
        while len(left):
            self._read(left[:step])
            # The next bounds are all smaller: what is open now is a beginning of what was.
            left = left[step:]
            left = left[bounds[left] >= self._threshold]
            step = min(4 * step, MOST)
        self.found.settle()
        self.proven = True

    @property
    def _threshold(self) -> np.float32:
        """The threshold for bounds, rounded down to their type."""
        return np.nextafter(np.float32(self.found.threshold), np.float32(-np.inf))

    def _read(self, rows: np.ndarray) -> None:
        rows = np.sort(rows)
        query = self._linear.queries[self._number].flatten().cpu()
        scores = scores_of_rows(self._store, self._linear, self._factors, query, rows)
        self.found.add(rows, scores.numpy(), self._bound.errors(self._number, rows))
        self.read += len(rows)


def _check(linear: InnerProduct, store: Store, index: ProjectionIndex) -> None:
    mine = kind_of(store, linear)
    if mine != index.kind:
        raise DminError(f"This index is of {index.kind}; the search needs {mine}: build it again.")
