"""LDS, removal and controls against SciPy, simulations that are linear, and their definitions."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from dmin.evaluation.controls import soft_max, squared, top_only
from dmin.evaluation.metrics import interval
from dmin.evaluation.truths.diversity import rank_correlations, shared_top
from dmin.evaluation.truths.lds import (
    Resamples,
    ceiling,
    lds,
    membership,
    random_subsets,
    weighted_spearman,
)
from dmin.evaluation.truths.removal import (
    rise,
    without_random,
    without_top,
    without_union,
)
from dmin.runtime.errors import DminError

QUERIES, EXAMPLES, SUBSETS = 12, 80, 40


def simulated(noise, seeds=2, seed=0):
    """A simulation where each example lowers a query's loss by its true score, plus noise."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=(QUERIES, EXAMPLES))
    members = membership(random_subsets(EXAMPLES, SUBSETS, seed=seed), EXAMPLES)
    expected = -(members.astype(float) @ truth.T)
    spread = noise * expected.std()
    return truth, members, expected + spread * generator.normal(size=(seeds, SUBSETS, QUERIES))


def test_subsets_are_random_halves_of_distinct_examples():
    subsets = random_subsets(81, 50, 0.5, seed=1)
    assert all(len(s) == 40 == len(set(s.tolist())) for s in subsets)
    share = membership(subsets, 81).mean(0)
    assert 0.25 < share.min() < 0.45 and 0.55 < share.max() < 0.75
    assert (random_subsets(81, 50, seed=2)[0] != subsets[0]).any()


def test_rank_correlation_is_that_of_scipy_with_ties():
    generator = np.random.default_rng(0)
    x, y = generator.integers(6, size=(5, 30)), generator.normal(size=(5, 30)).round(1)
    weights = generator.multinomial(30, np.full(30, 1 / 30), size=4)
    found = weighted_spearman(x, y, weights)
    for q in range(5):
        for r in range(4):
            drawn = np.repeat(np.arange(30), weights[r])
            assert found[q, r] == pytest.approx(spearmanr(x[q, drawn], y[q, drawn]).statistic)


def test_the_truth_scores_one_its_opposite_minus_one_and_a_constant_nothing():
    truth, members, losses = simulated(noise=0)
    assert np.allclose(lds(truth, members, losses.mean(0)), 1)
    assert np.allclose(lds(-truth, members, losses.mean(0)), -1)
    assert np.allclose(lds(np.ones_like(truth), members, losses.mean(0)), 0)
    stranger = np.random.default_rng(5).normal(size=truth.shape)
    assert abs(lds(stranger, members, losses.mean(0)).mean()) < 0.15


@pytest.mark.parametrize("seeds", [2, 4])
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_the_truth_reaches_the_ceiling(noise, seeds):
    reached, attainable, one = [], [], []
    for seed in range(20):
        truth, members, losses = simulated(noise, seeds, seed)
        reached.append(lds(truth, members, losses.mean(0)).mean())
        found = ceiling(losses)
        attainable.append(found.attainable.mean())
        one.append(found.one_seed.mean())
    assert np.mean(reached) == pytest.approx(np.mean(attainable), abs=0.03)
    assert np.mean(one) < np.mean(reached)


def test_the_bootstrap_covers_both_subsets_and_queries():
    """Its interval holds the value of the whole simulation about as often as it says."""
    covered = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        truth, members, losses = simulated(1.0, 1, seed)
        scores = truth + generator.normal(size=truth.shape)
        found = interval(
            lds(scores, members, losses[0]).mean(),
            Resamples(SUBSETS, QUERIES, 200, seed).means(scores, members, losses),
            min(SUBSETS, QUERIES),
        )
        assert found.low < found.mean < found.high
        # cor(truth, scores) = 1/√2, cor(losses, expected) = 1/√2; ρ ≈ (6/π) asin(r/2)
        covered += found.low < 6 / np.pi * np.arcsin(0.5 / 2) < found.high
    assert covered >= 50


def test_paired_differences_are_narrower_than_their_parts():
    truth, members, losses = simulated(0.5)
    generator = np.random.default_rng(1)
    resamples = Resamples(SUBSETS, QUERIES, 300)
    better, worse = (truth + s * generator.normal(size=truth.shape) for s in (0.5, 0.8))
    one, other = (
        resamples.means(x, members, losses.mean(0, keepdims=True)) for x in (better, worse)
    )
    assert (one - other).std() < np.hypot(one.std(), other.std())
    assert np.array_equal(
        one, Resamples(SUBSETS, QUERIES, 300).means(better, members, losses.mean(0, keepdims=True))
    )


def test_removal_leaves_out_the_top_and_nothing_else():
    scores = np.array([[5.0, 1, 4, 1, 3], [1, 2, 3, 4, 5]])
    assert [s.tolist() for s in without_top(scores, 2)] == [[1, 3, 4], [0, 1, 2]]
    assert without_union(scores, 3).tolist() == [1, 3]
    random = without_random(50, 10, 30, seed=1)
    assert all(len(s) == 40 == len(set(s.tolist())) for s in random)
    assert len({tuple(s) for s in random}) == 30
    for k in (0, 5):
        with pytest.raises(DminError, match=f"k={k}: choose 1 … 4"):
            without_top(scores, k)


def test_rise_is_in_percent_of_the_loss_without_random_ones():
    random = np.array([[1.0, 2.0], [3.0, 2.0]])
    assert rise(np.array([3.0, 2.0]), random).tolist() == [50, 0]


def test_transforms_keep_the_order_and_top_only_counts():
    scores = np.random.default_rng(0).normal(size=(4, 30))
    for changed in (squared(scores), soft_max(scores), soft_max(scores, 0.3)):
        assert (changed.argsort(1) == scores.argsort(1)).all()
    assert np.allclose(soft_max(scores).sum(1), 1)
    kept = top_only(scores, 7)
    assert (kept.sum(1) == 7).all() and (scores[kept == 1].min() > -1)
    assert (
        np.where(kept == 1, scores, np.inf).min(1) > np.where(kept == 0, scores, -np.inf).max(1)
    ).all()


def test_rank_correlation_tells_scores_that_do_not_look_at_the_query():
    generator = np.random.default_rng(0)
    common, own = generator.normal(size=(1, 400)), generator.normal(size=(10, 400))
    assert rank_correlations(common + 0 * own) == pytest.approx(1)
    assert abs(rank_correlations(own).mean()) < 0.05
    assert 0.3 < rank_correlations(common + own).mean() < 0.7


def test_distinct_examples_are_counted_once():
    scores = np.random.default_rng(0).normal(size=(8, 30))
    distinct = len(set(np.argsort(-scores, axis=1)[:, :5].ravel()))
    assert shared_top(scores, 5).mean() == pytest.approx(distinct / 40)


def test_what_cannot_be_measured_is_refused():
    truth, members, losses = simulated(0.1)
    with pytest.raises(DminError, match="12 queries × 40 subsets"):
        lds(truth, members, losses[0].T)
    with pytest.raises(DminError, match="finite"):
        lds(np.full_like(truth, np.nan), members, losses[0])
    with pytest.raises(DminError, match="two or more"):
        ceiling(losses[:1])
    with pytest.raises(DminError, match="two or more"):
        rank_correlations(truth[:1])
    with pytest.raises(DminError, match="k=81"):
        top_only(truth, 81)
