"""Metrics against their definitions, spelt out, and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from dmin.evaluation.metrics import bootstrap, interval, measure, within_bounds
from dmin.runtime.errors import DminError

GENERATOR = np.random.default_rng(0)
SCORES = GENERATOR.normal(size=(6, 40))
RELEVANT = GENERATOR.random((6, 40)) < 0.2


def ranked(scores, relevant):
    return [
        [right for _, right in sorted(zip(-s, r, strict=True), key=lambda pair: pair[0])]
        for s, r in zip(scores, relevant, strict=True)
    ]


@pytest.mark.parametrize("k", [1, 5, 40])
def test_precision_and_recall(k):
    for row, right in enumerate(ranked(SCORES, RELEVANT)):
        hits = sum(right[:k])
        assert measure(f"precision@{k}", SCORES, RELEVANT)[row] == pytest.approx(hits / k)
        assert measure(f"recall@{k}", SCORES, RELEVANT)[row] == pytest.approx(hits / sum(right))


def test_average_precision_is_that_of_scikit_learn():
    expected = [average_precision_score(r, s) for r, s in zip(RELEVANT, SCORES, strict=True)]
    assert np.allclose(measure("mAP", SCORES, RELEVANT), expected)


def test_reciprocal_rank():
    expected = [1 / (1 + right.index(True)) for right in ranked(SCORES, RELEVANT)]
    assert np.allclose(measure("MRR", SCORES, RELEVANT), expected)


@pytest.mark.parametrize("metric", ["precision@1", "precision@3", "recall@2", "mAP", "MRR"])
def test_equal_scores_count_as_their_mean_over_all_orders(metric):
    """Against ties broken at random, many times."""
    scores = np.array([[2.0, 1, 1, 1, 0, 0, 0, 0], [3, 3, 3, 3, 3, 3, 3, 3]])
    relevant = np.array([[0, 1, 0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 0, 0, 0]], dtype=bool)
    noise = 0.1 * np.random.default_rng(1).random((4000, 2, 8))
    broken = [measure(metric, scores + each, relevant) for each in noise]
    found = measure(metric, scores, relevant)
    assert found == pytest.approx(np.mean(broken, axis=0), abs=0.02)
    turned = measure(metric, scores[:, ::-1], relevant[:, ::-1])
    assert found == pytest.approx(turned, abs=1e-12)  # whatever the order of rows


def test_a_perfect_ranking_is_one_and_chance_is_the_share():
    perfect = RELEVANT.astype(float)
    for metric in ("mAP", "MRR", "precision@1"):
        assert (measure(metric, perfect, RELEVANT) == 1).all()
    relevant = np.tile(np.arange(1000) < 100, (200, 1))
    chance = measure("precision@50", GENERATOR.random((200, 1000)), relevant).mean()
    assert chance == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("metric", "scores", "relevant", "message"),
    [
        ("precision@41", SCORES, RELEVANT, "there are 40"),
        ("accuracy", SCORES, RELEVANT, "'accuracy': allowed are"),
        ("mAP", np.where(SCORES > 1, np.nan, SCORES), RELEVANT, "are NaN"),
        (
            "mAP",
            SCORES,
            RELEVANT & (np.arange(6) != 2)[:, None],
            "number 2 has no relevant example",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(metric, scores, relevant, message):
    with pytest.raises(DminError, match=message):
        measure(metric, scores, relevant)


@pytest.mark.parametrize(
    ("draw", "mean", "count", "least"),
    [("normal", 0, 4, 0.92), ("exponential", 1, 10, 0.92), ("exponential", 1, 60, 0.92)],
)
def test_intervals_of_few_and_of_skewed_values_cover(draw, mean, count, least):
    covered = 0
    for seed in range(300):
        values = getattr(np.random.default_rng(seed), draw)(size=count)
        found = bootstrap(values, resamples=300, seed=seed)
        assert found.mean == pytest.approx(values.mean())
        covered += found.low <= mean <= found.high
    assert least < covered / 300 < 0.985


def test_an_interval_of_equal_values_or_of_one_is_a_point():
    assert bootstrap(np.full(5, 0.3)) == pytest.approx((0.3, 0.3, 0.3))
    assert bootstrap(np.array([2.0])) == (2, 2, 2)


def test_a_few_resamples_far_off_do_not_stretch_an_interval_without_end():
    resampled = np.random.default_rng(0).normal(0.64, 0.03, 1000)
    resampled[:20] -= 0.15  # skewness −1.4
    found = interval(0.64, resampled, 20)
    plain = 2.15 * resampled.std()  # Student's t, without a correction
    assert found.high - 0.64 < plain < 0.64 - found.low < 2 * plain


def test_an_interval_ends_where_its_metric_does():
    assert within_bounds("precision@40", 1.02) == within_bounds("LDS", 1.02) == 1
    assert within_bounds("mAP", -0.01) == 0 and within_bounds("leave-out ρ", -1.1) == -1
    assert within_bounds("removal@50 %", 1.7) == 1.7
