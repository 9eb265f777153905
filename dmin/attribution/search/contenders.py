"""The best rows by the exact inner product: all that may be among them are scored again in double.

The error of a score of the scan has a known bound (:class:`ErrorBound`). A row can be among the k
best only if its score plus its bound reaches the k-th largest of the scores minus their bounds.
These rows are multiplied again in double and ordered by the result rounded to float32, which is the
score that is shown; equal scores are ordered by row number. So every search that considers all
rows, or excludes only rows that cannot be among the best, returns the same list, in any order and
on any device.
"""

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.search.scan import (
    CHUNK_BYTES,
    SEEN_AS,
    Span,
    kernel,
    lengthened,
    row_factors,
    scan,
    spans,
    stored_scales,
)
from dmin.attribution.search.threads import in_threads
from dmin.store import Store

MOST = 4096  # rows beyond k that wait to be scored once more
# Of ‖q‖ ‖z‖: sums of 128 products in float32 (see the kernel); factors, lengths and what is shown
# are rounded to float32, each less than 2⁻²⁴ of a score, a few times.
RELATIVE = (128 * (1 + 2.0**-10) + 16) * 2.0**-24
# Of what a row is multiplied by: below 2⁻¹²⁶ numbers of float32 lie 2⁻¹⁴⁹ apart.
ABSOLUTE = 2.0**-149


class ErrorBound:
    """The largest error of scores relative to exact inner products of stored rows and queries.

    ``|score − ⟨q, z⟩| ≤ 144.2 · 2⁻²⁴ ‖q‖ ‖z‖ + 2⁻¹⁴⁹ (1 + m Σ c)``, z the stored row times its
    factors c.

    Args:
        linear: the queries.
        store: the rows.
    """

    def __init__(self, linear: InnerProduct, store: Store) -> None:
        self.queries: np.ndarray = linear.queries.flatten(1).cpu().double().norm(dim=1).numpy()
        self._linear, self._store = linear, store
        self._width = int(np.prod(store.layout.row_shape))

    def of(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ``RELATIVE ‖z‖`` and what does not depend on the query, float64 ``[n]`` each."""
        readout, store = self._linear.readout, self._store
        lengths = store.lengths(readout)[rows].astype(np.float64) + ABSOLUTE
        own = lengthened(store, self._linear, rows)
        factors = row_factors(store, self._linear, rows)
        times = np.ones((len(lengths), 1)) if factors is None else factors.double().numpy()
        with np.errstate(invalid="ignore"):  # a length that overflowed, by nought
            reach = np.sqrt(np.square(lengths if own is None else lengths * own).sum((1, 2)))
        times = times.reshape(len(times), -1).sum(1)
        return RELATIVE * (1 + 1e-5) * reach, ABSOLUTE * (1 + self._width * times)

    def errors(self, query: int, rows: slice | np.ndarray) -> np.ndarray:
        """Return the bounds of one query's scores, float64 ``[n]``."""
        relative, absolute = self.of(rows)
        found: np.ndarray = self.queries[query] * relative + absolute
        return found


class Contenders:
    """The rows seen so far that may be among the k best of one query.

    Args:
        query: ``[D, T, G, k]``.
        linear: for its readout and scale.
        store: the rows.
        k: how many are asked for.

    Attributes:
        threshold: a row whose score plus its bound is below it cannot be among the best.
        rows: int64; after :meth:`settle` the k best, in order.
        scores: float64; after :meth:`settle` those shown.
        tied: further rows with the same score as the last one kept.
    """

    def __init__(self, query: Tensor, linear: InnerProduct, store: Store, k: int) -> None:
        self.query: Tensor = query.cpu()
        self.linear = linear
        self.store = store
        self.k = k
        self.rows = np.empty(0, np.int64)
        self.scores = self._errors = np.empty(0)
        self.threshold, self.tied, self._last = -np.inf, 0, np.nan

    def add(self, rows: np.ndarray, scores: np.ndarray, errors: np.ndarray) -> None:
        """Add new rows, with the bounds of their errors."""
        self.rows = np.concatenate([self.rows, rows])
        self.scores = np.concatenate([self.scores, scores])
        errors = np.concatenate([self._errors, np.where(np.isnan(errors), np.inf, errors)])
        self._errors = errors
        if len(self.rows) <= self.k:
            return
        # A sum that overflowed tells nothing: its row waits to be scored in double.
        known = np.isfinite(self.scores)
        lower = np.where(known, self.scores - errors, -np.inf)
        self.threshold = max(self.threshold, np.partition(lower, -self.k)[-self.k])
        kept = ~known | (self.scores + errors >= self.threshold)
        self.rows, self.scores, self._errors = self.rows[kept], self.scores[kept], errors[kept]
        if len(self.rows) > self.k + MOST:
            self.settle()

    def settle(self) -> None:
        """Score the remaining rows again in double, and keep the k best."""
        fresh = np.flatnonzero((self._errors > 0) | ~np.isfinite(self.scores))
        self.scores[fresh] = exact_scores(self.store, self.linear, self.query, self.rows[fresh])
        order = np.lexsort((self.rows, -self.scores))
        best, rest = order[: self.k], order[self.k :]
        last = self.scores[best[-1:]].sum()
        more = int((self.scores[rest] == last).sum())
        self.tied, self._last = more + (self.tied if last == self._last else 0), last
        self.rows, self.scores = self.rows[best], self.scores[best]
        self._errors = np.zeros(len(best))
        if len(best) == self.k:
            self.threshold = max(self.threshold, self.scores[-1])


class BestRows:
    """The k best rows of several queries, from a stream of their scores; used like ``TopK``.

    Args:
        linear: the queries; their largest scores are looked for.
        store: the rows.
        k: rows per query.
        keep: bool ``[N]``: the rows allowed; None for all.
    """

    def __init__(
        self, linear: InnerProduct, store: Store, k: int, keep: np.ndarray | None = None
    ) -> None:
        self._found = [Contenders(query, linear, store, k) for query in linear.queries]
        self._bound, self._keep = ErrorBound(linear, store), keep

    def update(self, scores: Tensor, first: int) -> None:
        """Take the scores ``[queries, n]`` of the rows from ``first``."""
        rows = slice(first, first + scores.shape[1])
        relative, absolute = self._bound.of(rows)
        most = self._bound.queries * relative.max() + absolute.max()
        thresholds = np.array([each.threshold for each in self._found])
        # Most blocks have nothing for most queries.
        some = ~(scores.amax(1).double().numpy() + most < thresholds)
        places = np.arange(len(relative))
        if self._keep is not None:
            places = places[self._keep[rows]]
        for query in np.flatnonzero(some) if len(places) else ():
            mine = scores[query].double().numpy()[places]
            errors = self._bound.queries[query] * relative[places] + absolute[places]
            near = ~(mine + errors < thresholds[query])
            self._found[query].add(first + places[near], mine[near], errors[near])

    def settled(self) -> list[Contenders]:
        """Return the contenders of each query, settled."""
        for _ in in_threads(Contenders.settle, self._found, compiled=True):
            pass
        return self._found

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores float32 ``[Q, k]``, descending, rows and, ``[Q]``, how many more tie."""
        return best_of(self.settled())


def best_of(found: list[Contenders]) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, rows and ties of several settled queries."""
    scores = torch.from_numpy(np.stack([each.scores for each in found])).float()
    rows = torch.from_numpy(np.stack([each.rows for each in found]))
    return scores, rows, torch.tensor([each.tied for each in found])


def contenders_of_all(
    linear: InnerProduct, store: Store, k: int, keep: np.ndarray | None = None
) -> list[Contenders]:
    """Return the k best rows of each query by reading everything; see :func:`scan`."""
    best = BestRows(linear, store, k, keep)
    for first, scores in scan(linear, store, keep=keep):
        best.update(scores, first)
    return best.settled()


def best_of_all(
    linear: InnerProduct, store: Store, k: int, keep: np.ndarray | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`best_of` what :func:`contenders_of_all` finds."""
    return best_of(contenders_of_all(linear, store, k, keep))


def exact_scores(store: Store, linear: InnerProduct, query: Tensor, rows: np.ndarray) -> np.ndarray:
    """Return the inner products of a query with chosen rows, added up in double, ``[n]``.

    They are rounded to float32, as they are shown and compared.

    Args:
        store: the rows.
        linear: for its readout and scale.
        query: ``[D, T, G, k]``.
        rows: which, ``[n]``.
    """
    steps, layout = int(np.prod(store.layout.row_shape[:2])), store.layout
    asked = query.reshape(steps, layout.steps // steps, -1).float().contiguous().numpy()
    # Unit rows are divided by the length they have, not by the one that is kept in float32.
    unit = linear.scale == "unit"
    found = np.empty(len(rows))

    def score(span: Span) -> None:
        some = rows[slice(*span)]
        stored = store.gather(linear.readout, some).reshape(len(some), *asked.shape)
        scale = np.ones(stored.shape[:3])
        if (scales := stored_scales(store, linear, some)) is not None:
            scale *= scales.reshape(scale.shape)
        if not unit and (own := lengthened(store, linear, some)) is not None:
            scale *= own.reshape(len(some), steps, 1)
        seen = stored.view(SEEN_AS[store.layout.dtype])
        kernel().rescored(seen, scale, unit, asked, found[slice(*span)])

    size = max(1, CHUNK_BYTES // store.layout.row_bytes)
    for _ in in_threads(score, spans(len(rows), size), compiled=True):
        pass
    return found.astype(np.float32).astype(np.float64)
