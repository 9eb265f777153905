"""A request for the best examples: its options, checked, and the steps to a ranking."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.features import FeatureSet
from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.merge import enough_of
from dmin.attribution.method import Method
from dmin.attribution.methods.at_timesteps import places_of
from dmin.attribution.ranking import Ranking
from dmin.attribution.scale import (
    READ,
    STREAMED,
    Answer,
    Sample,
    among,
    at_least,
    estimated,
    medians,
)
from dmin.attribution.scores import scored
from dmin.attribution.search.contenders import BestRows
from dmin.attribution.search.index import Index
from dmin.attribution.search.scan import gathered_rows
from dmin.attribution.search.selection import Groups, Selection
from dmin.attribution.search.topk import TopK, stable_topk
from dmin.runtime.errors import DminError
from dmin.store import Store


class Request:
    """One request: its checked options, and the steps from scores to a ranking."""

    def __init__(
        self,
        train: FeatureSet,
        method: Method,
        k: int,
        rows: int | None,
        selection: Selection,
        index: Index | None,
        device: str,
    ) -> None:
        self.train, self.method, self.k, self.rows = train, method, k, rows
        self.selection, self.index, self.device = selection, index, device
        metadata = train.store.metadata
        self.keep = selection.kept(metadata)
        self.groups = selection.groups(metadata) if selection.group_by else None
        if index is not None and self.groups is not None:
            raise DminError(
                "An index cannot be used: ranking by group needs every score. Set index=null."
            )
        allowed, what = selection.candidates(metadata)
        self.candidates, self.estimated = allowed, False
        self.everywhere, self.part = self.keep, False  # what `keep` is without a part
        if rows is not None and not (isinstance(rows, Integral) and rows >= 0):
            raise DminError(f"rows={rows!r}: give the rows to hold in memory at once, or None.")
        try:
            torch.empty(0, device=device).cpu().numpy()
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise DminError(f"device={device}: {reason}. Use cpu, or another one.") from error
        if not (isinstance(k, Integral) and 1 <= k <= allowed):
            raise DminError(f"k={k!r}: choose 1 … {allowed}, the number of {what}.")

    def narrow(self, part: range) -> int:
        """Restrict the search to some rows; return the number of results to find."""
        inside = np.zeros(len(self.train), dtype=bool)
        inside[part.start : part.stop] = True
        self.keep = inside if self.keep is None else self.keep & inside
        self.part = True
        found = int(self.keep.sum())
        self.k, self.candidates = min(self.k, found), found
        return found

    def batch(self, queries: FeatureSet, numbers: np.ndarray, asked: Any) -> Answer:
        """Return the best of a batch of queries."""
        self._check_split(queries, numbers, asked)
        if self.index is not None:
            return self._indexed(asked, self.index)
        within = self.keep if self.part else None
        sample = Sample(self.everywhere, len(self.train), STREAMED, within=within)
        best, sign = self.gathered(asked, sample), self.selection.sign
        if isinstance(best, Groups):
            return self.best_groups(best, queries, numbers, asked)
        scores, rows, tied = best.finish()
        parts = self._contributions(queries, numbers, asked, rows.numpy())
        found = sign * scores, rows, parts, at_least(scores, tied)
        limit = self.method.limit(asked, sign)
        if self.part:
            return Answer(*found, None, limit, sign * sample.scores)
        return Answer(*found, sign * sample.median, limit)

    def gathered(self, asked: Any, sample: Sample | None = None) -> BestRows | TopK | Groups:
        """Return the best rows, or the tallies of groups, times the sign."""
        best: BestRows | TopK | Groups | None = None
        sign, store = self.selection.sign, self.train.store
        if isinstance(asked, InnerProduct) and self.groups is None:
            best = BestRows(asked.times(sign), store, self.k, self.keep)
        blocks = scored(asked, self.train, self.method, self.rows, self.keep, self.device)
        for first, scores in blocks:
            scores = sign * scores.float()
            if self.keep is not None:
                out = ~torch.from_numpy(self.keep[first : first + scores.shape[1]])
                scores = scores.masked_fill(out, -torch.inf)
            if best is None:
                best = TopK(len(scores), self.k)
                if self.groups is not None:
                    best = Groups(len(scores), *self.groups)
            best.update(scores, first)
            if sample is not None:
                sample.update(scores, first)
        assert best is not None
        return best

    def best_groups(
        self, found: Groups, queries: FeatureSet, numbers: np.ndarray, asked: Any
    ) -> Answer:
        """Return scores and highest-ranked rows of the best groups."""
        kind, sign = self.selection.group_score, self.selection.sign
        scores = found.scores(kind)
        values, place = stable_topk(scores, self.k)
        rows = found.rows.gather(1, place)
        parts = limit = None
        if kind == "max":  # else it is no single example's score
            parts = self._contributions(queries, numbers, asked, rows.numpy())
            limit = self.method.limit(asked, sign)
        typical = sign * medians(scores[:, found.counts > 0])
        return Answer(sign * values, rows, parts, among(scores, values), typical, limit)

    def _indexed(self, asked: Any, index: Index) -> Answer:
        if not isinstance(asked, InnerProduct):
            raise DminError(
                f"An index cannot be used: {self.method.name} scores are not inner products. Set "
                f"index=null."
            )
        store, sign = self.train.store, self.selection.sign
        found = index.search(asked, store, self.k, sign, self.keep)
        sample = Sample(self.keep, len(store), READ)
        sample.read(asked, store)
        if found.tied is None:
            self.estimated = len(sample.rows) < self.candidates
            counted = estimated(sign * sample.scores, sign * found.scores, self.candidates)
        else:
            counted = at_least(sign * found.scores, found.tied)
        parts, limit = split(asked, store, found.rows.numpy()), self.method.limit(asked, sign)
        return Answer(found.scores, found.rows, parts, counted, sample.median, limit)

    def _contributions(
        self, queries: FeatureSet, numbers: np.ndarray, asked: Any, rows: np.ndarray
    ) -> Tensor | None:
        """Read the best rows again and split their scores by timestep and group, if possible."""
        if isinstance(asked, InnerProduct):
            return split(asked, self.train.store, rows)
        parts = []
        for query, winners in zip(numbers, rows, strict=True):
            found = self._contributions_to(queries, query, winners)
            if found is None:
                return None
            parts.append(found[0])
        return torch.stack(parts)

    def _contributions_to(self, queries: FeatureSet, query: int, rows: np.ndarray) -> Tensor | None:
        """Return the method's contributions for one query and some rows, ``[1, k, T, G]``."""
        method = self.method
        asked = method.transform_query(queries.block([query], method.requires))
        return method.contributions(asked, self.train.block(rows, method.requires))

    def _check_split(self, queries: FeatureSet, numbers: np.ndarray, asked: Any) -> None:
        """Check, before the scan, that scores can be split between groups of layers."""
        if not self.selection.split:
            return
        if len(self.train.store.layout.groups) < 2:
            raise DminError(
                "retrieve.split=true, but the store has one group of layers only. Collect it with "
                "collect.groups=block, layer, or names with regular expressions."
            )
        if self.groups is not None and self.selection.group_score != "max":
            raise DminError(
                f"retrieve.split=true, but the {self.selection.group_score} over "
                f"{self.selection.group_by} is not the score of a single example. Set "
                f"retrieve.group_score=max, or retrieve.split=false."
            )
        if isinstance(asked, InnerProduct):
            return
        found = self._contributions_to(queries, int(numbers[0]), np.arange(1))
        if found is None or found.shape[3] == 1:
            raise DminError(
                f"retrieve.split=true, but {self.method.name} scores cannot be split between "
                f"groups of layers: they do not come from inner products of gradients. Scores that "
                f"are one inner product (dmin, grad_dot, trak, spectral, …), averages of them, "
                f"and powers (spectral_energy, sharp_energy, das) can be split. Choose one of "
                f"these methods, or "
                f"set retrieve.split=false."
            )

    def answer(self, queries: FeatureSet, batches: Sequence[Answer]) -> Ranking:
        """Join the batches of queries, and look up ids and metadata."""
        whole = (None if each[0] is None else joined(each) for each in zip(*batches, strict=True))
        scores, rows, parts, counted, typical, maximum, sampled = whole
        assert scores is not None and rows is not None and counted is not None
        chosen, train = self.selection, self.train.store
        ids, metadata = train.ids, train.metadata
        if chosen.min_score is not None:
            enough = enough_of(scores, chosen.sign, chosen.min_score)
            scores, rows, counted = scores[:, :enough], rows[:, :enough], counted[:, :enough]
            parts = None if parts is None else parts[:, :enough]
        groups, steps = train.layout.groups, train.layout.timesteps
        asked: Any = queries if hasattr(queries, "ids") else queries.store  # of a Pool, or each
        about = list(asked.metadata)
        if self.method.timesteps is not None:
            kept = places_of(self.method.timesteps, steps)
            steps = tuple(steps[place] for place in kept)
            parts = None if parts is None else parts[:, :, kept]
            told = ", ".join(f"{t:g}" for t in steps)
            about = [{**each, "timesteps": told} for each in about]
        by_group = parts is not None and parts.shape[3] == len(groups) > 1
        return Ranking(
            method=self.method.name,
            timesteps=steps,
            query_ids=list(asked.ids),
            query_metadata=about,
            train_rows=rows,
            train_ids=[[ids[row] for row in each] for each in rows.tolist()],
            train_metadata=[[metadata[row] for row in each] for each in rows.tolist()],
            scores=scores,
            contributions=None if parts is None else parts.sum(3),
            groups=groups if by_group else (),
            group_contributions=parts.sum(2) if parts is not None and by_group else None,
            order=chosen.order,
            min_score=chosen.min_score,
            group_by=chosen.group_by,
            group_sizes=None if self.groups is None else self._sizes(rows),
            notes=self._notes(),
            candidates=self.candidates,
            maximum=maximum,
            typical=typical,
            sampled=sampled,
            at_least=counted,
            sample=min(READ, self.candidates) if self.estimated else None,
        )

    def _sizes(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of allowed examples in the group of each row."""
        assert self.groups is not None
        of = self.groups[1]
        counted = of if self.keep is None else of[self.keep]
        return np.bincount(counted[counted >= 0], minlength=len(self.groups[0]))[of[rows]]

    def _notes(self) -> dict[str, str]:
        notes = dict(self.method.notes())
        if self.groups is not None:
            kind = {"sum": "the sum", "mean": "the mean", "max": "the foremost"}
            notes["score"] = (
                f"of each {self.selection.group_by}: {kind[self.selection.group_score]} of its"
                " examples' scores; the foremost example is shown"
            )
        if self.index is not None:
            notes["search"] = self.index.note()
        return notes


def split(linear: InnerProduct, store: Store, rows: np.ndarray) -> Tensor:
    """Return what timesteps and groups add to the scores of rows ``[Q, k]``: ``[Q, k, T, G]``."""
    parts = []
    for query, winners in zip(linear.queries, rows, strict=True):
        chosen = gathered_rows(store, linear, winners)
        parts.append(torch.einsum("dtgk,ndtgk->ntg", query, chosen))
    return torch.stack(parts)


def joined(parts: Sequence[Tensor]) -> np.ndarray:
    """Return the batches' results as one array."""
    return torch.cat(list(parts)).numpy()
