"""Ground truths by retraining, in contexts where what retraining says is known."""

from types import SimpleNamespace

import numpy as np
import pytest
from evaluation.contexts import LinearContext

from dmin.evaluation import LDS, Diversity, LeaveOut, Removal, SelfInfluence, Tuning, UnionRemoval
from dmin.runtime.errors import DminError

QUERIES, EXAMPLES = 8, 60
TRUTH = np.random.default_rng(0).normal(size=(QUERIES, EXAMPLES))
STRANGER = np.random.default_rng(1).normal(size=(QUERIES, EXAMPLES))
ASKED = range(QUERIES)
LABELS = [f"c{i % 6}" for i in range(EXAMPLES)]


def labelled():
    ids = [str(i) for i in range(EXAMPLES)]
    return SimpleNamespace(ids=ids, path="here", metadata=[{"label": c} for c in LABELS])


@pytest.mark.parametrize(
    "truth",
    [LDS(20, 2), LeaveOut(), Removal(10, 4), UnionRemoval((5, 10), 2)],
    ids=lambda t: type(t).__name__,
)
def test_the_true_scores_win_and_strangers_do_not(truth):
    truth.prepare(LinearContext(TRUTH, labelled()), ASKED)
    true, other = truth.measure(TRUTH), truth.measure(STRANGER)
    for metric in true:
        assert true[metric].mean() > other[metric].mean() + 0.3, metric
    resampled = truth.resampled(TRUTH, true, 200)
    for metric, values in true.items():
        assert resampled[metric].shape == (200,)
        assert resampled[metric].min() - 1e-9 <= values.mean() <= resampled[metric].max() + 1e-9


def test_in_a_linear_world_the_truth_reaches_one_and_the_ceiling():
    lds = LDS(20, 2)
    lds.prepare(LinearContext(TRUTH), ASKED)
    assert np.allclose(lds.measure(TRUTH)["LDS"], 1)
    assert np.allclose(lds.references()["ceiling"]["LDS"], 1)
    out = LeaveOut()
    out.prepare(LinearContext(TRUTH, labelled()), ASKED)
    found = out.measure(TRUTH)
    assert np.allclose(found["leave-out ρ"], 1) and (found["leave-out hit"] == 1).all()
    assert out.measure(-TRUTH)["leave-out ρ"].mean() == pytest.approx(-1)


def test_settings_are_chosen_on_models_that_are_not_reported():
    asked = {"A": [], "B": []}
    for half, models in asked.items():
        context = LinearContext(TRUTH)
        told = context.retrain
        context.retrain = lambda subsets, seed, *rest, told=told, models=models: (
            models.extend((seed, tuple(subset)) for subset in subsets) or told(subsets, seed, *rest)
        )
        LDS(20, 2, half=half).prepare(context, ASKED)
    for what in (0, 1):  # seeds, subsets
        one, other = ({model[what] for model in models} for models in asked.values())
        assert one and not one & other
    by = Tuning({"retraining": "tune/subsets/LDS"})
    by.check({"tune": {"subsets": LDS(half="A")}})
    with pytest.raises(DminError, match="same retrained models as the reported"):
        by.check({"tune": {"subsets": LDS()}})


def test_removal_is_the_rise_over_removing_at_random():
    context, truth = LinearContext(TRUTH), Removal(k=10, queries=QUERIES, random=30)
    truth.prepare(context, ASKED)
    [(what, count)] = context.asked
    assert count == 30 and "random" in what
    gone = np.sort(TRUTH, axis=1)[:, -10:].sum(1)
    lost = 100 - TRUTH.sum(1) + gone
    base = truth._random[:, np.arange(QUERIES)].mean(0)
    assert np.allclose(truth.measure(TRUTH)["removal@10 %"], 100 * (lost / base - 1))


def test_a_union_must_hurt_its_own_queries_and_not_the_others():
    common = np.tile(TRUTH[:1], (QUERIES, 1))  # what hurts one hurts all: no group's own
    truth = UnionRemoval((10,), groups=2)
    truth.prepare(LinearContext(common), ASKED)
    assert abs(truth.measure(common)["union@10 %"].mean()) < 1e-9
    truth = UnionRemoval((10,), groups=2)
    truth.prepare(LinearContext(TRUTH), ASKED)
    assert truth.measure(TRUTH)["union@10 %"].mean() > 1


def test_queries_that_share_a_model_count_as_one():
    truth = UnionRemoval((10,), groups=4)
    truth._parts = np.array_split(np.arange(20), 4)
    shared = np.repeat([1.0, 2.0, 3.0, 4.0], 5)  # nothing differs within a group
    means = truth.resampled(TRUTH, {"union": shared}, 4000)["union"]
    assert means.mean() == pytest.approx(2.5, abs=0.05)
    assert means.std() == pytest.approx(np.std([1, 2, 3, 4]) / 2, rel=0.05)


def test_all_rows_are_trained_together():
    context, truth = LinearContext(TRUTH), Removal(k=10, queries=4)
    truth.prepare(context, ASKED)
    truth.expect({"one": TRUTH, "other": STRANGER})
    assert context.asked[-1][1] == 8


def test_marked_examples_are_compared_with_the_others():
    marked = [{"mislabelled": True} if i % 10 == 0 else {} for i in range(EXAMPLES)]
    losses = np.arange(EXAMPLES, dtype=float)
    store = SimpleNamespace(metadata=marked, losses=lambda: losses[:, None, None])
    context, truth = LinearContext(TRUTH), SelfInfluence(sample=20)
    context.train = SimpleNamespace(store=store)
    truth.prepare(context, None)
    assert len(truth.rows) == 6 + 20 and sorted(truth.rows[:6]) == list(range(0, 60, 10))
    high = np.array([1.0] * 6 + [0.0] * 20)
    assert truth.measure(high)["AUROC"].mean() == 1
    assert truth.measure(np.ones(26))["AUROC"].mean() == 0.5
    assert truth.references()["training loss"]["AUROC"].shape == (6,)
    with pytest.raises(DminError, match="0 of 60"):
        SelfInfluence("absent").prepare(context, None)


def test_diversity_tells_popularity():
    found = Diversity(5).measure(np.tile(TRUTH[:1], (QUERIES, 1)))
    assert found["rank correlation"].mean() == pytest.approx(1)
    assert found["distinct@5"].mean() == pytest.approx(1 / QUERIES)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(DminError, match="subsets=2"):
        LDS(2)
    with pytest.raises(DminError, match="half='C'"):
        LDS(half="C")
    with pytest.raises(DminError, match="seeds=1"):
        LeaveOut(seeds=1)
    with pytest.raises(DminError, match="two groups"):
        UnionRemoval((5,), groups=1)
    store = labelled()
    store.metadata = [{"label": "one"}] * EXAMPLES
    with pytest.raises(DminError, match="has 1 values"):
        LeaveOut().prepare(LinearContext(TRUTH, store), ASKED)
