"""Ground truths by training anew: without some examples, what does the model lose on a query?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dmin.attribution import FeatureSet
from dmin.evaluation.context import BenchmarkContext
from dmin.evaluation.controls import rank_correlations, shared_top
from dmin.evaluation.truths.base import Array, GroundTruth, Measures, column
from dmin.evaluation.truths.lds import Resamples, ceiling, lds, membership, random_subsets
from dmin.evaluation.truths.removal import rise, without_random, without_top, without_union
from dmin.runtime.errors import DminError
from dmin.runtime.sampling import evenly


class LDS(GroundTruth):
    """The linear datamodelling score over random subsets: see :mod:`dmin.evaluation.truths.lds`.

    Args:
        subsets: how many are trained on.
        seeds: models a subset; their mean is the target, their agreement the ceiling.
        share: of the examples in each subset.
    """

    ranks_only = False

    def __init__(self, subsets: int = 64, seeds: int = 2, share: float = 0.5) -> None:
        if subsets < 3 or seeds < 2 or not 0 < share < 1:
            raise DminError(
                f"LDS: subsets={subsets}, seeds={seeds}, share={share:g}: three or more subsets, "
                f"two or more seeds (for the ceiling) and a share between 0 and 1 are needed."
            )
        self.subsets, self.seeds, self.share = subsets, seeds, share

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Train a model on every subset and seed."""
        examples = len(context.train)
        subsets = random_subsets(examples, self.subsets, self.share)
        self._members = membership(subsets, examples)
        self._losses = np.stack(
            [
                context.retrain(subsets, seed, queries, f"retraining on subsets, seed {seed + 1}")
                for seed in range(self.seeds)
            ]
        )

    def measure(self, scores: Array) -> Measures:
        """Return the LDS of each query."""
        return {"LDS": lds(scores, self._members, self._losses.mean(0))}

    def resampled(self, scores: Array, measured: Measures, count: int) -> Measures:
        """Resample subsets and queries together."""
        draws = Resamples(self.subsets, len(scores), count)
        return {"LDS": draws.means(scores, self._members, self._losses.mean(0))}

    def references(self) -> Mapping[str, Measures]:
        """Return what is attainable, and what one seed foretells of the others."""
        found = ceiling(self._losses)
        return {"ceiling": {"LDS": found.attainable}, "one seed": {"LDS": found.one_seed}}


class LeaveOut(GroundTruth):
    """Does the sum of scores of each value of a column foretell the effect of leaving it out?

    With ``E(q, c)`` the rise of the query's loss when all examples of value c are left out and
    ``A(q, c) = Σ_{i: c(i) = c} τ(q, i)``: ``leave-out ρ`` is Spearman's correlation over c, and
    ``leave-out hit`` whether both name the same c first.

    Args:
        column: of the metadata, such as the label or a source.
        seeds: models a value.
    """

    ranks_only = False

    def __init__(self, column: str = "label", seeds: int = 2) -> None:
        if seeds < 2:
            raise DminError(f"LeaveOut: seeds={seeds}; the ceiling needs two or more.")
        self.column, self.seeds = column, seeds

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Train a model without each value, and seed.

        Raises:
            DminError: the column has fewer than three values.
        """
        of = column(context.train.store, self.column)
        values = np.unique(of)
        if len(values) < 3:
            raise DminError(
                f"LeaveOut: {self.column!r} has {len(values)} values among the training examples; "
                f"ranks need three or more. Use removal or LDS instead."
            )
        self._left_out = of[None, :] == values[:, None]  # [C, N]
        subsets = [np.flatnonzero(~row) for row in self._left_out]
        self._losses = np.stack(
            [
                context.retrain(
                    subsets, seed, queries, f"leaving each {self.column} out, {seed + 1}"
                )
                for seed in range(self.seeds)
            ]
        )

    def measure(self, scores: Array) -> Measures:
        """Return the correlation over values, and whether the first one agrees."""
        losses = self._losses.mean(0)  # [C, Q]
        first = (scores @ self._left_out.T).argmax(1) == losses.argmax(0)
        # What is left out raises the loss; what stays in lowers it.
        rank = lds(scores, ~self._left_out, losses)
        return {"leave-out ρ": rank, "leave-out hit": first.astype(np.float64)}

    def references(self) -> Mapping[str, Measures]:
        """Return what is attainable."""
        return {"ceiling": {"leave-out ρ": ceiling(self._losses).attainable}}


class Removal(GroundTruth):
    """Train anew without a query's top k: by how many percent does its loss rise?

    Against models trained without k random examples.

    Args:
        k: examples removed.
        queries: how many of the task's queries, evenly spread; one model each a row.
        seeds: models a query.
        random: models without random examples, a seed.
    """

    costly = True

    def __init__(self, k: int = 50, queries: int = 8, seeds: int = 1, random: int = 12) -> None:
        self.k, self.queries, self.seeds, self.random = k, queries, seeds, random

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Train without random examples."""
        self._context, self._side = context, queries
        self._asked = evenly(len(queries), self.queries, ends=True)
        sets = without_random(len(context.train), self.k, self.random, seed=1)
        self._random = self._losses(sets, f"removing {self.k} at random")

    def expect(self, scores: Mapping[str, Array]) -> None:
        """Train without the top k of every row's queries, all together."""
        sets = [s for each in scores.values() for s in self._sets(each)]
        self._losses(sets, f"removing each query's top {self.k}")

    def measure(self, scores: Array) -> Measures:
        """Return the rise in percent."""
        lost = self._losses(self._sets(scores), f"removing top {self.k}")
        own = lost[np.arange(len(self._asked)), self._asked]
        return {f"removal@{self.k} %": rise(own, self._random[:, self._asked])}

    def _sets(self, scores: Array) -> list[Array]:
        return without_top(scores[self._asked], self.k)

    def _losses(self, sets: Sequence[Array], what: str) -> Array:
        return mean_over_seeds(self._context, self._side, sets, self.seeds, what)


class UnionRemoval(GroundTruth):
    """Train anew without what a group of queries names together: does it hurt them, not others?

    The queries are cut into groups of neighbours. A group's queries take turns in naming k
    examples; without these, the rise of their own loss less that of all other queries. One model
    answers for a whole group.

    Args:
        k: examples removed, one or several numbers.
        groups: of queries; one model each a row and k.
        seeds: models a group.
        random: models without random examples, a seed.
    """

    costly = True

    def __init__(
        self, k: Sequence[int] = (50,), groups: int = 2, seeds: int = 1, random: int = 12
    ) -> None:
        if groups < 2 or not k:
            raise DminError(
                f"UnionRemoval: k={list(k)}, groups={groups}; at least one k and two groups (each "
                f"is the others' control) are needed."
            )
        self.k, self.groups, self.seeds, self.random = tuple(k), groups, seeds, random

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Train without random examples."""
        self._context, self._side = context, queries
        self._parts = np.array_split(np.arange(len(queries)), self.groups)
        self._random = {
            k: self._losses(
                without_random(len(context.train), k, self.random, seed=1),
                f"removing {k} at random",
            )
            for k in self.k
        }

    def expect(self, scores: Mapping[str, Array]) -> None:
        """Train without every row's unions, all together."""
        sets = [s for each in scores.values() for k in self.k for s in self._sets(each, k)]
        self._losses(sets, "removing what groups of queries name")

    def measure(self, scores: Array) -> Measures:
        """Return the rise of each query's loss less that of the other groups', in percent."""
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
        """Resample groups, and queries within them: those of one group share their model."""
        generator, parts = np.random.default_rng(0), self._parts
        drawn = generator.integers(len(parts), size=(count, len(parts)))
        within = [part[generator.integers(len(part), size=(count, len(part)))] for part in parts]
        found = {}
        for name, values in measured.items():
            sums = np.stack([values[rows].sum(1) for rows in within], axis=1)  # [R, groups]
            sizes = np.array([len(part) for part in parts])
            total = np.take_along_axis(sums, drawn, axis=1).sum(1)
            found[name] = total / sizes[drawn].sum(1)
        return found

    def _sets(self, scores: Array, k: int) -> list[Array]:
        return [without_union(scores[part], k) for part in self._parts]

    def _losses(self, sets: Sequence[Array], what: str) -> Array:
        return mean_over_seeds(self._context, self._side, sets, self.seeds, what)


class Diversity(GroundTruth):
    """What scores are like, whatever is true: do they look at the query at all?

    ``rank correlation`` of a query's scores with the other queries', mean: 1 for mere popularity.
    ``distinct@k``: its mean over queries is the number of distinct examples in all top k, over
    ``Q · k``.

    Args:
        k: of the top.
    """

    def __init__(self, k: int = 10) -> None:
        self.k = k

    def measure(self, scores: Array) -> Measures:
        """Return both for each query."""
        return {
            "rank correlation": rank_correlations(scores),
            f"distinct@{self.k}": shared_top(scores, self.k),
        }


def mean_over_seeds(
    context: BenchmarkContext, queries: FeatureSet, sets: Sequence[Array], seeds: int, what: str
) -> Array:
    """Return the losses ``[sets, Q]`` of models trained on sets of rows, mean over seeds."""
    lost = [context.retrain(sets, seed, queries, what) for seed in range(seeds)]
    return np.asarray(np.mean(lost, axis=0))
