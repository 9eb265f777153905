"""Averages over several models: each has its own stores, and its own fit."""

import numpy as np
import pytest
from made_stores import drawn, made, preset

from dmin.attribution import (
    TRAK,
    DMin,
    FeatureSet,
    GradCos,
    GradDot,
    JourneyTRAK,
    OverCheckpoints,
    Spectral,
    TRAKEnsemble,
    retrieve,
    score_matrix,
)
from dmin.runtime.errors import DminError

NAMES = ("later", "last")


def tracin(checkpoints=(), weights=None):
    return preset("tracin", checkpoints=list(checkpoints), weights=weights)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Return queries and training examples, each under three models."""
    pair = []
    for role, count in (("q", 3), ("x", 20)):
        each = []
        for model in range(3):
            folder = tmp_path_factory.mktemp(f"{role}{model}") / role
            each.append(FeatureSet(made(folder, drawn(count, seed=10 * model + count))))
        pair.append(FeatureSet(each[0].store, checkpoints=dict(zip(NAMES, each[1:], strict=True))))
    return tuple(pair)


def alone(sides, method):
    """Return the method's scores under each model by itself."""
    models = [sides, *([s.checkpoints[name] for s in sides] for name in NAMES)]
    return np.stack([score_matrix(*pair, method) for pair in models])


@pytest.mark.parametrize(
    ("average", "method", "weights"),
    [
        (tracin(NAMES), GradDot(), [1, 1, 1]),
        (tracin(NAMES, [3e-3, 1e-3, 1e-4]), GradDot(), [3e-3, 1e-3, 1e-4]),
        (preset("gas", checkpoints=list(NAMES)), GradCos(), [1, 1, 1]),
        (TRAKEnsemble(NAMES, alpha=0.3), TRAK(0.3), [1, 1, 1]),
        (OverCheckpoints(Spectral(), NAMES, [1, 0, 2]), Spectral(), [1, 0, 2]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize("rows", [None, 7])
def test_scores_are_the_weighted_mean_of_the_models(sides, average, method, weights, rows):
    expected = np.average(alone(sides, method), axis=0, weights=weights)
    found = score_matrix(*sides, average, rows=rows)
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_contributions_add_up_where_the_method_has_them(sides):
    found = retrieve(*sides, OverCheckpoints(DMin(), NAMES), k=5)
    assert np.allclose(found.contributions.sum(-1), found.scores, atol=1e-5)
    assert retrieve(*sides, preset("gas", checkpoints=list(NAMES)), k=5).contributions is None


def test_one_model_is_refused_and_so_is_a_checkpoint_that_is_not_there(sides, tmp_path):
    with pytest.raises(DminError, match="only one is given"):
        score_matrix(*sides, tracin())
    with pytest.raises(DminError, match="'first'"):
        score_matrix(*sides, tracin(["first"]))
    with pytest.raises(DminError, match="2 numbers for 3 models"):
        OverCheckpoints(GradDot(), NAMES, [1, 2])
    queries, train = sides
    fewer = FeatureSet(
        train.store, checkpoints={"later": FeatureSet(made(tmp_path / "other", drawn(19)))}
    )
    with pytest.raises(DminError, match="same examples in the same order"):
        score_matrix(queries, fewer, tracin(["later"]))


def test_journey_trak_is_the_mean_over_the_states_of_the_queries(sides, tmp_path):
    train = sides[1]
    states = [FeatureSet(made(tmp_path / str(n) / "q", drawn(3, seed=50 + n))) for n in range(4)]
    queries = FeatureSet(sides[0].store, trajectory=states)
    expected = np.mean([score_matrix(state, train, TRAK(0.3)) for state in states], 0)
    found = score_matrix(queries, train, JourneyTRAK(0.3))
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert np.array_equal(
        retrieve(queries, train, JourneyTRAK(0.3), k=20).scores.max(1),
        retrieve(queries, train, JourneyTRAK(0.3), k=1).scores[:, 0],
    )
    with pytest.raises(DminError, match=r"queries\.trajectory=10"):
        score_matrix(sides[0], train, JourneyTRAK())
    others = FeatureSet(
        sides[0].store, trajectory=[FeatureSet(made(tmp_path / "more" / "q", drawn(4)))]
    )
    with pytest.raises(DminError, match="same examples"):
        score_matrix(others, train, JourneyTRAK())
