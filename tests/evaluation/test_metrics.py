"""Metrics against their definitions, spelt out, and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from dmin.evaluation.metrics import bootstrap, measure
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


def test_equal_scores_are_ranked_by_row():
    relevant = np.array([[False, True, True]])
    assert measure("MRR", np.zeros((1, 3)), relevant)[0] == 0.5


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
        ("mAP", SCORES, RELEVANT & (np.arange(6) != 2)[:, None], "number 2 has no right answer"),
    ],
)
def test_what_cannot_be_measured_is_refused(metric, scores, relevant, message):
    with pytest.raises(DminError, match=message):
        measure(metric, scores, relevant)


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).exponential(size=60)
        found = bootstrap(values, resamples=400, seed=seed)
        assert found.mean == pytest.approx(values.mean())
        covered += found.low <= 1 <= found.high
    assert 0.87 < covered / 200 < 0.99
