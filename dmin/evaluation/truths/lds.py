"""The linear datamodelling score: do sums of scores predict the losses of retrained models?

Train models on many random subsets S of the data. A good attribution τ orders their losses of a
query by ``Σ_{i∈S} τ_i`` (Park et al. 2023, arXiv 2303.14186).

M subsets, Q queries, N training examples, R resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from dmin.attribution import FeatureSet
from dmin.evaluation.context import BenchmarkContext
from dmin.evaluation.truths.base import Array, GroundTruth, Measures
from dmin.runtime.errors import DminError

Half = Literal["A", "B"]
HALVES = {"A": 1000, "B": 0}  # offset of the seeds of subsets and of training


@dataclass(eq=False)
class LDS(GroundTruth):
    """The linear datamodelling score over random subsets.

    Args:
        subsets: number of subsets.
        seeds: models per subset; their mean loss is the target, their agreement the ceiling.
        share: fraction of the examples in each subset.
        half: ``A`` (for tuning) or ``B`` (reported): two sets of subsets and seeds without a common
            model.

    Raises:
        DminError: a number is out of range, or there is no such half.
    """

    subsets: int = 64
    seeds: int = 2
    share: float = 0.5
    half: Half = "B"
    ranks_only = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.half not in HALVES:
            raise DminError(f"LDS: half={self.half!r}: choose A (for tuning) or B (reported).")
        if self.subsets < 3 or self.seeds < 2 or not 0 < self.share < 1:
            raise DminError(
                f"LDS: subsets={self.subsets}, seeds={self.seeds}, share={self.share:g}: three or "
                f"more subsets, two or more seeds (for the ceiling) and a share between 0 and 1 "
                f"are needed."
            )

    def prepare(self, context: BenchmarkContext, queries: FeatureSet) -> None:
        """Train a model on every subset and seed."""
        examples = len(context.train)
        self.clusters = min(self.subsets, len(queries))
        key = HALVES[self.half]
        subsets = random_subsets(examples, self.subsets, self.share, key)
        self._members = membership(subsets, examples)
        what = "retraining on subsets" + (" for tuning" if self.half == "A" else "")
        self._losses = np.stack(
            [
                context.retrain(subsets, key + seed, queries, f"{what}, seed {seed + 1}")
                for seed in range(self.seeds)
            ]
        )

    def measure(self, scores: Array) -> Measures:
        """Return the LDS of each query."""
        return {"LDS": lds(scores, self._members, self._losses.mean(0))}

    def resampled(self, scores: Array, measured: Measures, count: int) -> Measures:
        """Resample subsets, queries and seeds together."""
        draws = Resamples(self.subsets, len(scores), count, seeds=self.seeds)
        return {"LDS": draws.means(scores, self._members, self._losses)}

    def references(self) -> Mapping[str, Measures]:
        """Return the ceiling, and the correlation of one seed's losses with the others'."""
        found = ceiling(self._losses)
        return {"ceiling": {"LDS": found.attainable}, "one seed": {"LDS": found.one_seed}}


def random_subsets(examples: int, count: int, share: float = 0.5, seed: int = 0) -> list[Array]:
    """Return random subsets of equal size, each in ascending order.

    Args:
        examples: N.
        count: M.
        share: fraction of the examples in each.
        seed: of the random subsets.
    """
    generator = np.random.default_rng(seed)
    size = round(share * examples)
    return [np.sort(generator.permutation(examples)[:size]) for _ in range(count)]


def membership(subsets: Sequence[Array], examples: int) -> Array:
    """Return which examples are in each subset, bool ``[M, N]``."""
    found = np.zeros((len(subsets), examples), dtype=bool)
    for row, subset in zip(found, subsets, strict=True):
        row[subset] = True
    return found


def lds(scores: Array, members: Array, losses: Array) -> Array:
    """Return the LDS of each query, ``[Q]``: Spearman's ρ over subsets.

    ``ρ_S( Σ_{i∈S} τ(q, i), −loss_S(q) )``

    Args:
        scores: τ, ``[Q, N]``; positive: the example lowers the query's loss.
        members: bool ``[M, N]``.
        losses: of each query under the model of each subset, ``[M, Q]``; mean over seeds.

    Raises:
        DminError: shapes disagree, or a score is not finite.
    """
    predicted = scores.astype(np.float64) @ members.T.astype(np.float64)
    if predicted.shape != losses.T.shape or not np.isfinite(predicted).all():
        raise DminError(
            f"LDS: {scores.shape[0]} queries × {members.shape[0]} subsets of scores against losses "
            f"of shape {losses.shape} [subsets, queries]; all must be finite."
        )
    weights = np.ones((1, len(members)))
    return weighted_spearman(predicted, -losses.T, weights)[:, 0]


class Resamples:
    """Bootstrap of subsets, queries and seeds together, with the same draws for every method.

    So differences of two methods are paired: subtract their :meth:`means`.

    Args:
        subsets: M.
        queries: Q.
        count: R.
        seed: of the bootstrap.
        seeds: number of training seeds.
    """

    def __init__(
        self, subsets: int, queries: int, count: int = 1000, seed: int = 0, seeds: int = 1
    ) -> None:
        generator = np.random.default_rng(seed)
        self.weights: np.ndarray = generator.multinomial(
            subsets, np.full(subsets, 1 / subsets), size=count
        )
        self.queries: np.ndarray = generator.integers(queries, size=(count, queries))
        chosen: np.ndarray = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        self.seeds: np.ndarray = chosen / seeds

    def means(self, scores: Array, members: Array, losses: Array) -> Array:
        """Return the mean LDS in each resample, ``[R]``.

        Args:
            scores: as for :func:`lds`.
            members: as for :func:`lds`.
            losses: of each seed, ``[seeds, M, Q]``.
        """
        predicted = scores.astype(np.float64) @ members.T.astype(np.float64)
        found = np.zeros(len(self.weights))
        mixtures, kind = np.unique(self.seeds, axis=0, return_inverse=True)
        for number, mixture in enumerate(mixtures):
            there = kind.ravel() == number
            truth = -np.tensordot(mixture, losses, 1).T
            each = weighted_spearman(predicted, truth, self.weights[there].astype(np.float64))
            found[there] = each.T[np.arange(there.sum())[:, None], self.queries[there]].mean(1)
        return found


class Ceiling(NamedTuple):
    """Limits of the LDS due to randomness of retraining; each ``[Q]``."""

    one_seed: Array  # ρ of one seed's losses with the mean of the others', averaged over seeds
    attainable: Array  # ρ of the expected losses with the mean over seeds


def ceiling(losses: Array) -> Ceiling:
    """Return the LDS that a method can exceed only by chance.

    With r the mean ρ between two seeds, the mean of s seeds has the reliability
    ``s r / (1 + (s − 1) r)`` (Spearman and Brown); its square root is the largest correlation.

    Args:
        losses: ``[seeds, M, Q]``.

    Raises:
        DminError: there is only one seed.
    """
    seeds = len(losses)
    if seeds < 2:
        raise DminError("the LDS ceiling compares seeds: retrain each subset with two or more.")
    weights = np.ones((1, losses.shape[1]))
    flat = [losses[s].T for s in range(seeds)]
    pairs = [(a, b) for a in range(seeds) for b in range(a + 1, seeds)]
    r = np.mean([weighted_spearman(flat[a], flat[b], weights)[:, 0] for a, b in pairs], axis=0)
    others = [np.mean([flat[b] for b in range(seeds) if b != a], axis=0) for a in range(seeds)]
    one = [weighted_spearman(flat[a], others[a], weights)[:, 0] for a in range(seeds)]
    positive = np.clip(r, 0, 1)
    return Ceiling(np.mean(one, axis=0), np.sqrt(seeds * positive / (1 + (seeds - 1) * positive)))


def weighted_spearman(x: Array, y: Array, weights: Array) -> Array:
    """Return Spearman's ρ of rows of x and y with weighted columns; ties get their mean rank.

    Args:
        x: ``[Q, M]``.
        y: ``[Q, M]``.
        weights: ``[R, M]``, how many times each column counts.

    Returns:
        float64 ``[Q, R]``; 0 where x or y is constant.
    """
    a, b = _centred_ranks(x, weights), _centred_ranks(y, weights)
    top = np.einsum("rm,qmr,qmr->qr", weights, a, b)
    below = np.einsum("rm,qmr->qr", weights, a**2) * np.einsum("rm,qmr->qr", weights, b**2)
    return np.where(below > 0, top / np.sqrt(np.where(below > 0, below, 1)), 0)


def _centred_ranks(x: Array, weights: Array) -> Array:
    """Return the weighted rank of each column minus the mean rank, ``[Q, M, R]``."""
    order = (x[:, None, :] < x[:, :, None]) + 0.5 * (x[:, None, :] == x[:, :, None])
    ranks = order @ weights.T
    return ranks - np.einsum("rm,qmr->qr", weights, ranks)[:, None] / weights.sum(1)
