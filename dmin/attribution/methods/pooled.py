"""Several queries as one: the mean or maximum of their scores, optionally minus that of others."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.method import Method
from dmin.data.base import Example
from dmin.data.part import dimmed

NAMED = 4  # of each side, at most, in the id and in the picture


class Pool(FeatureSet):
    """Several queries Q as one, optionally minus others, A; see :class:`Pooled`.

    Args:
        queries: Q.
        against: A, if any.
        kind: ``mean`` or ``max``.
    """

    def __init__(self, queries: FeatureSet, against: FeatureSet | None = None, kind: str = "mean"):
        vars(self).update(vars(queries))
        self.sides, self.kind = [queries, *([] if against is None else [against])], kind
        members = [list(side.store.ids) for side in self.sides]
        named = (", ".join(ids[:NAMED]) + ", …" * (len(ids) > NAMED) for ids in members)
        self.ids: list[str] = [" − ".join(f"{kind} of {names}" for names in named)]
        told = zip(("pool", "members", "against"), (kind, *members), strict=False)
        self.metadata: list[dict[str, Any]] = [dict(told)]

    def __len__(self) -> int:
        """Return 1."""
        return 1

    def block(self, rows: Any, requires: Requires) -> ExampleBlock:
        """Return all of Q."""
        return self.sides[0].block(range(len(self.sides[0])), requires)

    def example(self, id: str) -> Example:
        """Return the first pictures side by side, those of Q before those of A."""
        found = [side.example(i) for side in self.sides for i in side.store.ids[:NAMED]]
        shown = [dimmed(each.image, each.mask) for each in found]
        shown = [x[:, x.shape[1] // 2] if x.ndim == 4 else x for x in shown]  # of clips, the middle
        drawn = [each.expand(3, -1, -1) for each in shown]
        alike = [torch.nn.functional.interpolate(d[None], drawn[0].shape[1:])[0] for d in drawn]
        return Example(id, torch.cat(alike, 2))


class Pooled(Method):
    """Another method's scores, pooled over the queries, minus those of others.

    ``I(Q, i) = pool_{q ∈ Q} I(q, i) − pool_{a ∈ A} I(a, i)``, pool the mean or the maximum

    A mean of inner products is the inner product with the mean, and scanned or searched as one
    query.

    Args:
        method: whose scores.
        pool: Q and A; None for each query alone, minus the mean over :meth:`others`.
    """

    def __init__(self, method: Method, pool: Pool | None = None) -> None:
        self.method, self.requires, self.timesteps = method, method.requires, method.timesteps
        self.kind: str | None = None if pool is None else pool.kind
        self.against: Sequence[FeatureSet] = () if pool is None else pool.sides[1:]
        self.name: str = f"{method.name}, {self.kind} over queries"
        vars(self).update(check=method.check, notes=method.notes)  # are those of the method

    def fit(self, train: FeatureSet) -> None:
        """Fit the method, and prepare A as its queries."""
        self.method.fit(train)
        self._others = [self.method.transform_query(block) for block in self.others(train)]

    def others(self, train: FeatureSet) -> list[ExampleBlock]:
        """Return A."""
        return [side.block(range(len(side)), self.requires) for side in self.against]

    def transform_query(self, queries: ExampleBlock) -> Any:
        """Return one inner product if the scores are one, else the queries of Q and A."""
        found = [self.method.transform_query(queries), *self._others]
        if self.kind == "max" or not isinstance(found[0], InnerProduct):
            return found
        return replace(found[0], queries=self._pooled([each.queries for each in found]))

    def score(self, queries: Any, train: ExampleBlock) -> Tensor:
        """Return ``[1, n]``, or ``[Q, n]`` of each query alone."""
        if isinstance(queries, InnerProduct):
            return queries.scores(train)
        return self._pooled([self.method.score(asked, train) for asked in queries])

    def contributions(self, queries: Any, train: ExampleBlock) -> Tensor | None:
        """Return what groups add at timesteps, if the method has it; undefined for a maximum."""
        if isinstance(queries, InnerProduct):
            return queries.contributions(train)
        parts = [self.method.contributions(asked, train) for asked in queries]
        known = [part for part in parts if part is not None]
        return None if self.kind == "max" or len(known) < len(parts) else self._pooled(known)

    def _pooled(self, sides: Sequence[Tensor]) -> Tensor:
        """Return the pooled values ``[Q, ...]`` of Q, minus those of A."""
        pool = torch.amax if self.kind == "max" else torch.mean
        first, *others = [pool(values.double(), 0, keepdim=True) for values in sides]
        return ((first if self.kind else sides[0]) - sum(others)).float()
