"""Settings are chosen on queries of their own, along a path on which queries are projected once."""

import numpy as np
import pytest
from attribution.made_stores import made

from dmin.attribution import DMin, FeatureSet, PixelL2, SharpEnergy, Spectral
from dmin.attribution.curvature.curvature import Curvature
from dmin.attribution.scores import fitted_scores
from dmin.evaluation import Tuning
from dmin.evaluation.metrics import measure

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


def test_a_walk_projects_queries_once_and_finds_what_fresh_methods_find(world, monkeypatch):
    counted = []
    project = Curvature.coordinates
    monkeypatch.setattr(Curvature, "coordinates", lambda *args: counted.append(1) or project(*args))
    tuning = Tuning({"any": "tune/label/mAP"}, effective=[2.0, 8.0], p=[1.0, 2.0])
    method = SharpEnergy()
    method.fit(world["x"][0])
    scores = {}

    def judge(point, tasks):
        scores[point.effective, point.p] = (
            point,
            fitted_scores(world["tune"][0], world["x"][0], point),
        )
        return {"tune/label/mAP": judged(world, point, "tune")}

    chosen, path = tuning.walk("sharp_energy", method, judge)
    assert len(path) == 4 and len(counted) == 1
    assert [row["effective"] for row in path] == [2.0, 2.0, 8.0, 8.0]
    assert path[0]["alpha"] > path[2]["alpha"]  # fewer directions are left by more damping
    for point, found in scores.values():
        fresh = SharpEnergy(effective=point.effective, p=point.p)
        fresh.fit(world["x"][0])
        assert np.allclose(fitted_scores(world["tune"][0], world["x"][0], fresh), found, rtol=1e-4)
    assert all(point.known is None for point in chosen.values()) and method.known is None


def test_only_what_its_fit_does_not_use_is_tuned(world):
    tuning = Tuning({"any": "tune/label/mAP"})
    assert not tuning.tunes(DMin()) and not tuning.tunes(PixelL2())
    method = Spectral(10.0)
    method.fit(world["x"][0])
    assert tuning.tunes(method) and tuning.moved(method, Spectral(3.0)).alpha == 3.0
