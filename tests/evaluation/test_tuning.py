"""Timestep weights are chosen on queries of their own, and find the timestep with the signal."""

import numpy as np
import pytest
from attribution.made_stores import made

from dmin.attribution import DMin, FeatureSet, PixelL2, SharpEnergy, Spectral
from dmin.attribution.curvature.curvature import Curvature
from dmin.attribution.scores import fitted_scores
from dmin.evaluation import Report, Tuning
from dmin.evaluation.metrics import measure
from dmin.evaluation.report.plots import weights as plot
from dmin.evaluation.tuning import bump
from dmin.runtime.errors import DminError

SIGNAL, CLASSES = 1, 4


def planted(path, count, seed):
    """Rows of noise, but for one timestep of three, where each class has its own direction."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((count, 1, 3, 1, 64)).astype(np.float32)
    labels = np.arange(count) % CLASSES
    rows[np.arange(count), 0, SIGNAL, 0, labels] += 6
    return FeatureSet(made(path, rows)), labels


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    names = {"x": (80, 0), "tune": (24, 1), "test": (24, 2)}
    return {name: planted(folder / name, *how) for name, how in names.items()}


def judged(world, method, task):
    (train, labels), (asked, theirs) = world["x"], world[task]
    relevant = theirs[:, None] == labels[None]
    return float(measure("mAP", fitted_scores(asked, train, method), relevant).mean())


@pytest.mark.parametrize("method", [DMin(), Spectral(10.0)], ids=lambda m: m.name)
def test_weights_find_the_timestep_that_has_the_signal(world, method):
    method.fit(world["x"][0])
    tuning = Tuning({"planted": "tune/label/mAP"}, alpha=[10.0], p=[1.0], widths=[0.1, 0.5])

    def judge(point, tasks):
        return {f"{task}/label/mAP": judged(world, point, task) for task in tasks}

    assert tuning.tunes(method) and not tuning.tunes(PixelL2())
    chosen, path = tuning.walk(method.name, method, judge, steps=3)
    ((row, point),) = chosen.items()
    assert int(point.weights.argmax()) == SIGNAL and point.weights[SIGNAL] > 2.9
    assert "weights = [0.00, 3.00, 0.00]" in row.settings
    assert method.weights is None  # as it was
    # On queries that nothing was chosen on, it is better than even weights.
    assert judged(world, point, "test") > judged(world, method, "test") + 0.1
    assert len(path) == 1 + 2 * 3
    best = max(path, key=lambda r: r["tune/label/mAP"])
    assert (best["centre"], best["width"]) == (0.5, 0.1)
    assert tuning.moved(method, point).weights is point.weights
    assert plot(Report([], path)) is not None


def test_a_walk_projects_queries_once_and_finds_what_fresh_methods_find(world, monkeypatch):
    counted = []
    project = Curvature.coordinates
    monkeypatch.setattr(Curvature, "coordinates", lambda *args: counted.append(1) or project(*args))
    tuning = Tuning({"any": "tune/label/mAP"}, effective=[2.0, 8.0], p=[1.0, 2.0], widths=[0.5])
    method = SharpEnergy()
    method.fit(world["x"][0])
    scores = {}

    def judge(point, tasks):
        scores[point.effective, point.p, str(point.weights)] = (
            point,
            fitted_scores(world["tune"][0], world["x"][0], point),
        )
        return {"tune/label/mAP": judged(world, point, "tune")}

    chosen, path = tuning.walk("sharp_energy", method, judge, steps=3)
    assert len(path) == 4 + 3 and len(counted) == 1
    assert [row["effective"] for row in path[:4]] == [2.0, 2.0, 8.0, 8.0]
    assert path[0]["alpha"] > path[2]["alpha"]  # fewer directions are left by more damping
    for point, found in scores.values():
        weights = None if point.weights is None else point.weights.tolist()
        fresh = SharpEnergy(effective=point.effective, p=point.p, weights=weights)
        fresh.fit(world["x"][0])
        assert np.allclose(fitted_scores(world["tune"][0], world["x"][0], fresh), found, rtol=1e-4)
    assert all(point.known is None for point in chosen.values()) and method.known is None


def test_weights_stay_even_where_nothing_is_gained(world):
    method = DMin()
    tuning = Tuning({"any": "tune/label/mAP"}, widths=[0.1])
    assert not Tuning({"any": "tune/label/mAP"}).tunes(method)
    chosen, _ = tuning.walk("dmin", method, lambda *_: {"tune/label/mAP": 0.5}, steps=3)
    assert [point.weights for point in chosen.values()] == [None]


def test_bumps_have_mean_one_and_widths_are_checked():
    assert np.allclose(bump(10, 0.4, 0.2).mean(), 1) and bump(1, 0.0, 0.1).tolist() == [1.0]
    with pytest.raises(DminError, match=r"tuning\.widths=\[0\]"):
        Tuning({}, widths=[0]).check({})
