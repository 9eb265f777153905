"""Two methods as one: each in units of its own spread, weighed and added up."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.method import Method
from dmin.runtime.errors import DminError
from dmin.runtime.sampling import evenly
from dmin.store import Layout


@dataclass(frozen=True)
class PreparedQuery:
    """What the parts made of the queries, and what each part's scores are multiplied by."""

    queries: list[Any]
    scales: list[Tensor]  # [Q], one a part


class Blend(Method):
    """The sum of two methods' scores, each divided by its spread over the training examples.

    ``I(q, i) = I_first(q, i) / s_first(q) + share · I_second(q, i) / s_second(q)``

    with s the standard deviation over training examples (of at most ``sample``, evenly spaced). A
    part whose scores are all the same adds nothing.
    As shipped both are `sharp_energy`: the first squared, of directions alone, the second as it is,
    with lengths. Two ground truths look at two ends of a list. LDS adds scores up, so the few
    largest decide it; a search for a source reads the order of the many. A first part with few
    large scores and a second, broad one serve both (experiments/lds), from DMin's own store and
    one fit. Scores are in units of their own query's: they rank examples for a query, and say
    nothing of one query beside another, or of examples' influence on themselves.

    Args:
        first: one method.
        second: another.
        share: of the second, in units of spreads.
        sample: training examples that s is estimated from; what they need is kept in memory.

    Raises:
        DminError: the share is no number, the sample has fewer than two, or both methods average
            over checkpoints, but not the same.
    """

    name = "blend"

    def __init__(
        self, first: Method, second: Method, share: float = 0.1, sample: int = 1024
    ) -> None:
        if not math.isfinite(share) or sample < 2:
            raise DminError(
                f"method.share={share}, method.sample={sample}: give a finite share of the second "
                f"method, and a sample of two or more."
            )
        needs = [method.requires for method in (first, second)]
        checkpoints = {n.checkpoints for n in needs if n.checkpoints}
        if len(checkpoints) > 1:
            raise DminError(
                "method.first and method.second average over different checkpoints. Give both the "
                "same, in the same order."
            )
        self.methods, self.shares, self.sample = [first, second], [1.0, share], sample
        self.requires = Requires(
            readouts=tuple(dict.fromkeys(name for n in needs for name in n.readouts)),
            images=any(n.images for n in needs),
            checkpoints=next(iter(checkpoints), ()),
            journey=any(n.journey for n in needs),
            model=any(n.model for n in needs),
        )

    def fit(self, train: FeatureSet) -> None:
        """Fit a copy of each method, and keep a sample of the training examples."""
        self.methods = [copy.copy(method) for method in self.methods]
        for method in self.methods:
            method.fit(train)
        self._sample = train.block(evenly(len(train), self.sample), self.requires)

    def notes(self) -> dict[str, str]:
        """Return each method's notes."""
        found = [(m.name, m.notes()) for m in self.methods]
        return {f"{what} of {name}": note for name, notes in found for what, note in notes.items()}

    def transform_query(self, queries: ExampleBlock) -> PreparedQuery:
        """Return what each method makes of the queries, and its share in units of its spread."""
        asked = [method.transform_query(queries) for method in self.methods]
        scales = []
        for method, share, each in zip(self.methods, self.shares, asked, strict=True):
            spread = method.score(each, self._sample).double().std(1, correction=0)
            # Scores that are all the same rank nothing: such a part is left out.
            scales.append(torch.where(spread > 0, share / spread, 0.0).float())
        return PreparedQuery(asked, scales)

    def score(self, queries: PreparedQuery, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        parts = zip(self.methods, queries.queries, queries.scales, strict=True)
        return torch.stack([m.score(q, train) * s[:, None] for m, q, s in parts]).sum(0)

    def contributions(self, queries: PreparedQuery, train: ExampleBlock) -> Tensor | None:
        """Return what each timestep adds, ``[Q, n, T]``, if both methods can say."""
        found = []
        for method, asked, scale in zip(self.methods, queries.queries, queries.scales, strict=True):
            part = method.contributions(asked, train)
            if part is None:
                return None
            found.append(part * scale[:, None, None])
        return torch.stack(found).sum(0)

    def group_contributions(
        self, queries: PreparedQuery, train: ExampleBlock, layout: Layout
    ) -> Tensor | None:
        """Return what each group of layers adds, ``[Q, n, T, G]``, if both methods can say."""
        found = []
        for method, asked, scale in zip(self.methods, queries.queries, queries.scales, strict=True):
            part = method.group_contributions(asked, train, layout)
            if part is None:
                return None
            found.append(part * scale[:, None, None, None])
        return torch.stack(found).sum(0)
