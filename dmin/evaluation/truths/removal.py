"""Removal: retrain without the examples that a method ranks highest, and measure the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmin.attribution import FeatureSet
from dmin.evaluation.context import BenchmarkContext
from dmin.evaluation.truths.base import Array, GroundTruth, Measures
from dmin.runtime.errors import DminError
from dmin.runtime.sampling import evenly


class _WithoutRows(GroundTruth):
    """Retrains without some rows, with several seeds."""

    costly = True
    seeds: int

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Keep context and queries for later."""
        self._context, self._side = context, queries

    def _losses(self, sets: Sequence[Array], what: str) -> Array:
        """Return the losses ``[sets, Q]`` of models trained on sets of rows, mean over seeds."""
        each = (self._context.retrain(sets, seed, self._side, what) for seed in range(self.seeds))
        return np.asarray(np.mean(list(each), axis=0))

    def _at_random(self, k: int, models: int) -> Array:
        sets = without_random(len(self._context.train), k, models, seed=1)
        return self._losses(sets, f"removing {k} at random")


@dataclass(eq=False)
class Removal(_WithoutRows):
    """Retrain without a query's top k: by how many percent does its loss rise?

    The rise is relative to models trained without k random examples.

    Args:
        k: examples removed.
        queries: number of the task's queries that are used, evenly spread.
        seeds: models per query and row.
        random: models without random examples, per seed.
    """

    k: int = 50
    queries: int = 8
    seeds: int = 1
    random: int = 12

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Train without random examples."""
        super().prepare(context, queries)
        self._asked = evenly(len(queries), self.queries, ends=True)
        self._random = self._at_random(self.k, self.random)

    def expect(self, scores: Mapping[str, Array]) -> None:
        """Train without the top k of the queries, for all rows together."""
        sets = [s for each in scores.values() for s in self._sets(each)]
        self._losses(sets, f"removing each query's top {self.k}")

    def measure(self, scores: Array) -> Measures:
        """Return the rise of each query's loss, in percent."""
        lost = self._losses(self._sets(scores), f"removing top {self.k}")
        own = lost[np.arange(len(self._asked)), self._asked]
        return {f"removal@{self.k} %": rise(own, self._random[:, self._asked])}

    def _sets(self, scores: Array) -> list[Array]:
        return without_top(scores[self._asked], self.k)


@dataclass(eq=False)
class UnionRemoval(_WithoutRows):
    """Retrain without the top examples of a group of queries: do only their losses rise?

    The queries are split into groups of consecutive ones. The queries of a group choose k examples
    in turns. Measured is the rise of their losses without these, minus the mean rise of all other
    queries. One model serves a whole group.

    Args:
        k: examples removed, one or several numbers.
        groups: number of groups.
        seeds: models per group, row and k.
        random: models without random examples, per seed.
    """

    k: Sequence[int] = (50,)
    groups: int = 2
    seeds: int = 1
    random: int = 12

    def __post_init__(self) -> None:
        """Refuse an empty k and fewer than two groups."""
        if self.groups < 2 or not self.k:
            raise DminError(
                f"UnionRemoval: k={list(self.k)}, groups={self.groups}; at least one k and two "
                f"groups (each is the others' control) are needed."
            )
        self.clusters = self.groups

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Train without random examples."""
        super().prepare(context, queries)
        self._parts = np.array_split(np.arange(len(queries)), self.groups)
        self._random = {k: self._at_random(k, self.random) for k in self.k}

    def expect(self, scores: Mapping[str, Array]) -> None:
        """Train without the unions of all rows together."""
        sets = [s for each in scores.values() for k in self.k for s in self._sets(each, k)]
        self._losses(sets, "removing what groups of queries name")

    def measure(self, scores: Array) -> Measures:
        """Return the rise of each query's loss minus that of the other groups, in percent."""
        found = {}
        for k in self.k:
            lost = self._losses(self._sets(scores, k), f"removing {k}")
            each = np.stack([rise(row, self._random[k]) for row in lost])  # [groups, Q]
            own = np.zeros(each.shape[1])
            for row, part in zip(each, self._parts, strict=True):
                own[part] = row[part] - np.delete(row, part).mean()
            found[f"union@{k} %"] = own
        return found

    def resampled(self, scores: Array, measured: Measures, count: int) -> Measures:
        """Resample groups, and queries within them, because a group's queries share a model."""
        generator, parts = np.random.default_rng(0), self._parts
        drawn = generator.integers(len(parts), size=(count, len(parts)))
        within = [part[generator.integers(len(part), size=(count, len(part)))] for part in parts]
        sizes, found = np.array([len(part) for part in parts]), {}
        for name, values in measured.items():
            sums = np.stack([values[rows].sum(1) for rows in within], axis=1)  # [R, groups]
            total = np.take_along_axis(sums, drawn, axis=1).sum(1)
            found[name] = total / sizes[drawn].sum(1)
        return found

    def _sets(self, scores: Array, k: int) -> list[Array]:
        return [without_union(scores[part], k) for part in self._parts]


def without_top(scores: Array, k: int) -> list[Array]:
    """Return for each query all examples but its k best; ties are broken by row.

    Args:
        scores: ``[Q, N]``.
        k: how many to remove.

    Raises:
        DminError: that would leave nothing, or remove nothing.
    """
    _check(k, scores.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")
    return [np.sort(row[k:]) for row in order]


def without_union(scores: Array, k: int) -> Array:
    """Return all examples but the k best of the queries together.

    Queries take turns: each chooses its next best example until k are found. So one retrained
    model serves many queries.

    Args:
        scores: ``[Q, N]``.
        k: how many to remove.

    Raises:
        DminError: that would leave nothing, or remove nothing.
    """
    _check(k, scores.shape[1])
    turns = np.argsort(-scores, axis=1, kind="stable").T.ravel()
    _, first = np.unique(turns, return_index=True)
    return np.setdiff1d(np.arange(scores.shape[1]), turns[np.sort(first)[:k]])


def without_random(examples: int, k: int, count: int, seed: int = 0) -> list[Array]:
    """Return all examples but k random ones, several times.

    Raises:
        DminError: that would leave nothing, or remove nothing.
    """
    _check(k, examples)
    generator = np.random.default_rng(seed)
    return [np.sort(generator.permutation(examples)[k:]) for _ in range(count)]


def rise(removed: Array, random: Array) -> Array:
    """Return by how many percent each query's loss exceeds that without random examples.

    Args:
        removed: loss of each query under the model trained without its top examples, ``[Q]``.
        random: losses under the models trained without random ones, ``[models, Q]``.

    Returns:
        ``[Q]``, in percent.
    """
    return 100 * (removed / random.mean(0) - 1)


def _check(k: int, examples: int) -> None:
    if not 1 <= k < examples:
        raise DminError(f"removal of k={k}: choose 1 … {examples - 1}, of {examples} examples.")
