"""The answer to *which training examples made this image?*, as arrays that can be saved."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dmin.attribution.ranking_rows import Tabular
from dmin.runtime.errors import DminError

COUNTS = ("group_sizes", "at_least", "tiers", "copy_of")  # int64 [Q, K]
PER_QUERY = ("maximum", "typical", "sampled", "tier_goes_on")  # float32 or bool, [Q, …]
ERRORS = ("sketch_errors", "total_errors", "stability")  # float32 [Q, K]
PARTS = ("contributions", "group_contributions", *ERRORS, *COUNTS)


@dataclass(frozen=True, eq=False, repr=False)
class Ranking(Tabular):
    """The top-k training examples of each query, best first.

    Q queries, K training examples per query, T timesteps, G groups of parameters.

    Args:
        method: name of the attribution method.
        timesteps: the T timesteps, in the order of `contributions`.
        query_ids: Q distinct ids.
        query_metadata: one small JSON dict for each query: label and provenance.
        train_rows: int64 [Q, K], rows of the training store.
        train_ids: [Q][K] names of the training examples.
        train_metadata: [Q][K] small JSON dicts, typically label, caption, file.
        scores: float32 [Q, K], descending along K, in the units of the method.
        contributions: float32 [Q, K, T], what each timestep adds to the score, or None.
        groups: names of the G groups; empty if there is only one.
        group_contributions: float32 [Q, K, G], what each group adds to the score, or None.
        sketch_errors: float32 [Q, K], standard error of each score from compression alone, or None;
            see `dmin.attribution.confidence`, also for the next two.
        total_errors: float32 [Q, K], the same from compression and draws of noise, or None.
        stability: float32 [Q, K], probability that each example is among the first K, or None.
        order: "proponents", or "opponents" for scores that ascend along K.
        min_score: scores below it (opponents: above its negative) are not part of the answer; they
            only pad queries with fewer answers.
        group_by: metadata column whose values were ranked, each represented by its highest-ranked
            example. None if examples were ranked.
        group_sizes: int64 [Q, K], examples of each such value, or None.
        notes: further remarks, such as how the answer was found.
        about: its origin, for the header: model, adapter, weights, store, date.
        candidates: examples that were ranked, or values of ``group_by``; None if not known.
        maximum: float32 [Q], the largest score possible (opponents: the smallest), or None.
        typical: float32 [Q], the median score of all candidates, or of a sample of them, or None.
        sampled: float32 [Q, n], for a part: the scores of the sample within it, or None.
        at_least: int64 [Q, K], candidates that score at least as much (opponents: at most), each
            counting itself, or None.
        sample: number of candidates that `at_least` is estimated from; None if all were counted.
        tiers: int64 [Q, K], from 0 and ascending: the order within one tier is not significant; or
            None; see `dmin.attribution.confidence`.
        tier_goes_on: bool [Q], whether the last tier continues past K, or None.
        blind: the timesteps that hardly distinguish examples, or None if not measured.
        copy_of: int64 [Q, K], the first rank with the same pixels (`attribution.copies`), or None.
        tied_copies: [Q][K], ids past K with the same pixels and score, or None.
        same_as: [Q], ids of the training examples with the query's own pixels, or None.

    Raises:
        DminError: the arguments disagree in shape, order or sum.
    """

    method: str
    timesteps: tuple[float, ...]
    query_ids: list[str]
    query_metadata: list[dict[str, Any]]
    train_rows: np.ndarray
    train_ids: list[list[str]]
    train_metadata: list[list[dict[str, Any]]]
    scores: np.ndarray
    contributions: np.ndarray | None = None
    groups: tuple[str, ...] = ()
    group_contributions: np.ndarray | None = None
    sketch_errors: np.ndarray | None = None
    total_errors: np.ndarray | None = None
    stability: np.ndarray | None = None
    order: str = "proponents"
    min_score: float | None = None
    group_by: str | None = None
    group_sizes: np.ndarray | None = None
    notes: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    candidates: int | None = None
    maximum: np.ndarray | None = None
    typical: np.ndarray | None = None
    sampled: np.ndarray | None = None
    at_least: np.ndarray | None = None
    sample: int | None = None
    tiers: np.ndarray | None = None
    tier_goes_on: np.ndarray | None = None
    blind: tuple[float, ...] | None = None
    copy_of: np.ndarray | None = None
    tied_copies: list[list[list[str]]] | None = None
    same_as: list[list[str]] | None = None

    def __post_init__(self) -> None:
        """Convert the arrays to their dtypes and check their shapes."""
        # A frozen dataclass is set through object: the conversions are part of its construction.
        object.__setattr__(self, "timesteps", tuple(float(t) for t in self.timesteps))
        object.__setattr__(self, "groups", tuple(self.groups))
        for name in ("train_rows", "scores", *PER_QUERY, *PARTS):
            if (value := getattr(self, name)) is not None:
                whole = np.int64 if name in ("train_rows", *COUNTS) else np.float32
                kind = bool if name == "tier_goes_on" else whole
                object.__setattr__(self, name, np.asarray(value, kind))
        self._check_shapes()
        self._check_values()

    def _check_shapes(self) -> None:
        if self.scores.ndim != 2 or not self.scores.size:
            _refuse("scores", list(self.scores.shape), "[queries, k], both at least 1")
        queries, k = self.scores.shape
        lists = ("train_ids", "train_metadata", "tied_copies")
        for name in ("query_ids", "query_metadata", "same_as", *lists, *PER_QUERY):
            if (value := getattr(self, name)) is not None and len(value) != queries:
                _refuse(name, len(value), f"{queries} entries, one for each query")
        for name in lists:
            lengths = {len(row) for row in getattr(self, name) or ()}
            if lengths - {k}:
                _refuse(name, sorted(lengths), f"{k} entries a query, as in scores")
        for name in ("train_rows", *ERRORS, *COUNTS):
            if (value := getattr(self, name)) is not None and value.shape != (queries, k):
                _refuse(name, list(value.shape), f"[{queries}, {k}], as in scores")
        for name, axis, what in (
            ("contributions", self.timesteps, "timestep"),
            ("group_contributions", self.groups, "group"),
        ):
            parts, expected = getattr(self, name), (queries, k, len(axis))
            if parts is not None and parts.shape != expected:
                _refuse(name, list(parts.shape), f"{list(expected)}, one a {what}")
        if (self.group_contributions is None) != (not self.groups):
            _refuse("groups", list(self.groups), "names, only with group_contributions")

    def _check_values(self) -> None:
        repeated = sorted(name for name, n in Counter(self.query_ids).items() if n > 1)
        if repeated:
            _refuse("query_ids", repeated[:3], "a different name for each query")
        if len(set(self.timestep_names)) != len(self.timesteps):
            _refuse("timesteps", list(self.timesteps), "every timestep once")
        if not np.isfinite(self.scores).all():
            where = np.argwhere(~np.isfinite(self.scores))[0].tolist()
            _refuse("scores", f"{self.scores[tuple(where)]} at {where}", "finite numbers")
        if self.order not in ("proponents", "opponents"):
            _refuse("order", repr(self.order), "'proponents' or 'opponents'")
        steps = np.diff(self._sign * self.scores, axis=1)
        if (steps > 0).any():
            query = int(np.argwhere(steps > 0)[0, 0])
            wrong, right = ("rise", "de") if self._sign > 0 else ("fall", "a")
            _refuse("scores", f"a {wrong} in query {query}", f"{right}scending scores: best first")
        for name in ("contributions", "group_contributions"):
            if (parts := getattr(self, name)) is None:
                continue
            # Wide enough for half-precision arithmetic, far narrower than a forgotten weight.
            scale = float(np.abs(parts).sum(axis=2).max())
            gap = float(np.abs(parts.sum(axis=2) - self.scores).max())
            if not gap <= 1e-2 * scale + 1e-12:
                _refuse(name, f"a gap of {gap:.3g} to the scores", "terms that sum to them")

    def first(self, k: int) -> Ranking:
        """Return the first k examples of each query."""
        cut: dict[str, Any] = {
            name: None if value is None else value[:, :k]
            for name in PARTS
            for value in [getattr(self, name)]
        }
        return replace(
            self,
            train_rows=self.train_rows[:, :k],
            train_ids=[row[:k] for row in self.train_ids],
            train_metadata=[row[:k] for row in self.train_metadata],
            scores=self.scores[:, :k],
            tier_goes_on=None if k < self.scores.shape[1] else self.tier_goes_on,
            tied_copies=self.tied_copies and [row[:k] for row in self.tied_copies],
            **cut,
        )

    @property
    def _sign(self) -> int:
        return 1 if self.order == "proponents" else -1

    def count(self, query: int) -> int:
        """Return how many of a query's examples are part of the answer: see `min_score`."""
        if self.min_score is None:
            return self.scores.shape[1]
        # As float32, like the scores: one that equals the bound is in.
        return int((self._sign * self.scores[query] >= np.float32(self.min_score)).sum())

    def percentile(self, query: int, rank: int) -> float | None:
        """Return how many percent of the candidates score less (opponents: more), if known."""
        if self.at_least is None or not self.candidates:
            return None
        return 100 * (1 - int(self.at_least[query, rank]) / self.candidates)

    def cards(self, query: int) -> list[int]:
        """Return the ranks to show: of copies of one picture only the first."""
        shown = range(self.count(query))
        return [r for r in shown if self.copy_of is None or self.copy_of[query, r] == r]

    def copies(self, query: int, rank: int) -> list[str]:
        """Return the other examples found with the same pixels."""
        if self.copy_of is None:
            return []
        alike = np.flatnonzero(self.copy_of[query] == self.copy_of[query, rank])
        more = [] if self.tied_copies is None else self.tied_copies[query][alike[0]]
        return [self.train_ids[query][other] for other in alike if other != rank] + more

    @property
    def centred(self) -> np.ndarray | None:
        """Contributions minus their mean over the examples shown, [Q, K, T]."""
        if self.contributions is None:
            return None
        parts = self.contributions.astype(np.float64)
        for query, part in enumerate(parts):
            if shown := self.count(query):
                part -= part[:shown].mean(0)
        return parts.astype(np.float32)

    @property
    def order_shares(self) -> np.ndarray | None:
        """The share of each timestep in the order of the examples shown, float32 [Q, T].

        ``Cov(c_t, s) / Var(s)`` over the examples shown; the shares of a query add up to one. NaN
        where all scores are equal, or only one is shown.
        """
        if (parts := self.centred) is None:
            return None
        found = np.full((len(parts), len(self.timesteps)), np.nan)
        for query, part in enumerate(parts.astype(np.float64)):
            totals = (shown := part[: self.count(query)]).sum(1)
            if (variance := totals @ totals) > 1e-12 * np.square(self.scores[query]).sum():
                found[query] = totals @ shown / variance
        return found.astype(np.float32)

    def places(self) -> Iterator[tuple[int, int]]:
        """Yield query and rank of everything that is part of the answer."""
        queries = range(len(self.query_ids))
        yield from ((query, rank) for query in queries for rank in range(self.count(query)))

    @property
    def timestep_names(self) -> list[str]:
        """Column names of the timesteps: `t0950` for whole steps, `t0.95` for times."""
        if all(t.is_integer() for t in self.timesteps):
            return [f"t{int(t):04d}" for t in self.timesteps]
        return [f"t{t:.6g}" for t in self.timesteps]

    def same_label(self, query: int, rank: int) -> bool | None:
        """Say whether a training example carries its query's label; None where one has none.

        Also None if the values of another column are ranked.
        """
        if self.group_by not in (None, "label"):
            return None
        mine = self.query_metadata[query].get("label")
        other = self.train_metadata[query][rank].get("label")
        return None if mine is None or other is None else str(mine) == str(other)

    def label(self, query: int, rank: int) -> str | None:
        """Return the label of an example, or the value of the group that it represents."""
        value = self.train_metadata[query][rank].get(self.group_by or "label")
        return None if value is None else str(value)

    @property
    def errors(self) -> tuple[str, np.ndarray] | None:
        """The most comprehensive error, and its name: `total` if known, else `sketch`."""
        for name in ("total", "sketch"):
            if (found := getattr(self, f"{name}_errors")) is not None:
                return name, found
        return None


def headline(ranking: Ranking) -> str:
    """Return a short headline of a ranking."""
    if ranking.group_by is not None:
        what = "is behind" if ranking.order == "proponents" else "speaks against"
        return f"Which {ranking.group_by} {what} each image"
    what = "behind" if ranking.order == "proponents" else "that speak against"
    return f"Training examples {what} each image"


def format_score(score: float) -> str:
    """Format a score: three decimals, or scientific notation if these would be zero."""
    size, score = abs(score), score + 0.0  # no minus before zero
    if not math.isfinite(size) or size == 0 or 5e-3 <= size < 1e4:
        return f"{score:.3f}"
    return f"{score:.1e}"


def _refuse(name: str, value: object, allowed: str) -> None:
    raise DminError(
        f"A ranking cannot have {name} = {value}: allowed is {allowed}. "
        "Create rankings with retrieve, and do not reorder them."
    )
