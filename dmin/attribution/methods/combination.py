"""Several methods as one: a weighted sum of their scores."""

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.method import Method
from dmin.runtime.errors import DminError
from dmin.runtime.sampling import evenly


class PreparedQuery(NamedTuple):
    """The prepared queries of each part, and the weights of its scores."""

    queries: list[Any]
    weights: list[Tensor]  # [Q], or [1] where all queries have the same


class Combination(Method):
    """A sum of methods' scores, each with a weight that may depend on the query.

    ``I(q, i) = Σ_m w_m(q) I_m(q, i)``

    Attributes:
        methods: the parts, fitted by :meth:`fit`.
    """

    methods: list[Method]

    @property
    @abstractmethod
    def titles(self) -> Sequence[str]:
        """Names of the parts in notes."""

    @abstractmethod
    def weights(self, queries: list[Any]) -> list[Tensor]:
        """Return each part's weights, ``[Q]`` or ``[1]``, of its prepared queries."""

    def blocks(self, block: ExampleBlock) -> Sequence[ExampleBlock]:
        """Return the block for each part."""
        return [block] * len(self.methods)

    def notes(self) -> dict[str, str]:
        """Return each part's notes."""
        found = [(title, m.notes()) for title, m in zip(self.titles, self.methods, strict=True)]
        return {f"{what} of {title}": n for title, notes in found for what, n in notes.items()}

    def transform_query(self, queries: ExampleBlock) -> PreparedQuery:
        """Prepare the queries for each part, with its weights."""
        parts = zip(self.methods, self.blocks(queries), strict=True)
        prepared = [method.transform_query(block) for method, block in parts]
        return PreparedQuery(prepared, self.weights(prepared))

    def score(self, queries: PreparedQuery, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        parts = zip(self.methods, *queries, self.blocks(train), strict=True)
        return torch.stack([w[:, None] * m.score(q, block) for m, q, w, block in parts]).sum(0)

    def limit(self, queries: PreparedQuery, sign: int = 1) -> Tensor | None:
        """Return the sum of the parts' limits, if all have one."""
        found = []
        for method, prepared, weight in zip(self.methods, *queries, strict=True):
            limit = method.limit(prepared, sign)
            if limit is None or (weight < 0).any():
                return None
            found.append(weight * limit)
        return torch.stack(found).sum(0)

    def contributions(self, queries: PreparedQuery, train: ExampleBlock) -> Tensor | None:
        """Return what groups add at timesteps, ``[Q, n, T, G]``, if every part has it."""
        found = []
        for m, q, weight, block in zip(self.methods, *queries, self.blocks(train), strict=True):
            part = m.contributions(q, block)
            if part is None:
                return None
            found.append(part * weight[:, None, None, None])
        if len({part.shape[3] for part in found}) > 1:  # one of them distinguishes no groups
            found = [part.sum(3, keepdim=True) for part in found]
        return torch.stack(found).sum(0)


class Blend(Combination):
    """The sum of two methods' scores, each divided by its spread over the training examples.

    ``I(q, i) = I_first(q, i) / s_first(q) + share · I_second(q, i) / s_second(q)``

    with s the standard deviation over training examples (at most ``sample``, evenly spaced). A
    part with constant scores adds nothing. By default
    both are `sharp_energy`: the first with a square and only directions, the second with
    norms. Ground truths depend on different parts of a ranking: LDS sums scores, so the few largest
    decide it; a search for a source depends on the order of many. A first part with
    few large scores and a second, broader one serve both (experiments/lds), from DMin's own
    store and one fit. Scores are in units of each query: they rank examples for one
    query, but cannot be compared between queries, nor used as self-influence.

    Args:
        first: one method.
        second: another.
        share: weight of the second, in units of standard deviations.
        sample: training examples that s is estimated from, kept in memory.

    Raises:
        DminError: the share is not a number, the sample has fewer than two, or both methods average
            over checkpoints, but over different ones.
    """

    name = "blend"

    def __init__(
        self, first: Method, second: Method, share: float = 0.1, sample: int = 1024
    ) -> None:
        if not math.isfinite(share) or sample < 2:
            raise DminError(
                f"method.share={share}, method.sample={sample}: give a finite weight of the second "
                f"method, and a sample of two or more."
            )
        needs = [method.requires for method in (first, second)]
        checkpoints = {n.checkpoints for n in needs if n.checkpoints}
        if len(checkpoints) > 1:
            raise DminError(
                "method.first and method.second average over different checkpoints. Give both the "
                "same, in the same order."
            )
        self.methods: list[Method] = [first, second]
        self.shares: list[float] = [1.0, share]
        self.sample = sample
        self.requires: Requires = Requires(
            readouts=tuple(dict.fromkeys(name for n in needs for name in n.readouts)),
            images=any(n.images for n in needs),
            checkpoints=next(iter(checkpoints), ()),
            trajectory=any(n.trajectory for n in needs),
            model=any(n.model for n in needs),
        )

    @property
    def titles(self) -> list[str]:
        """The methods' names."""
        return [method.name for method in self.methods]

    def check(self) -> None:
        """Check both."""
        for method in self.methods:
            method.check()

    def fit(self, train: FeatureSet) -> None:
        """Fit a copy of each method, and keep a sample of the training examples."""
        self.methods = [copy.copy(method) for method in self.methods]
        for method in self.methods:
            method.fit(train)
        self._sample = train.block(evenly(len(train), self.sample), self.requires)

    def weights(self, queries: list[Any]) -> list[Tensor]:
        """Return each method's weight divided by its standard deviation."""
        found = []
        for method, share, each in zip(self.methods, self.shares, queries, strict=True):
            spread = method.score(each, self._sample).double().std(1, correction=0)
            # Scores that are all the same rank nothing: such a part is left out.
            found.append(torch.where(spread > 0, share / spread, 0.0).float())
        return found
