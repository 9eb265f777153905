"""An example that an epoch passes three times counts as one that stands there three times."""

import csv

import numpy as np
import pytest
from made_stores import drawn, made, preset

from dmin.attribution import FeatureSet, retrieve, score_matrix
from dmin.attribution.ranking_files import save_ranking
from dmin.runtime.errors import DminError

ONCE = np.arange(40)
PASSES = np.where(np.isin(ONCE, (2, 11)), 3, np.where(ONCE == 7, 2, 1))
METHODS = ("trak", "relative_if", "datainf", "das", "spectral", "sharp_energy", "popularity")


def side(path, rows, readout, passes=None, **settings):
    """A side of 40 examples, of which some stand there several times, or are told to."""
    features = drawn(40, draws=2, times=3, groups=2, dim=4, seed=3)
    features[[2, 7, 11]] *= 4
    norms = np.random.default_rng(5).uniform(0.5, 2, features.shape[:4]).astype(np.float32)
    told = None if passes is None else [{} if n == 1 else {"repeats": int(n)} for n in passes]
    more = {"norms": norms[rows], "losses": norms[rows, :, :, 0], "readout": readout}
    return FeatureSet(made(path, features[rows], metadata=told, **more), **settings)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Of each readout: queries; examples told to be passed so often, standing there, or once."""
    found = {}
    for of in ("loss", "mean_output"):
        at = tmp_path_factory.mktemp(of)
        queries = made(at / "q", drawn(3, draws=2, times=3, groups=2, dim=4, seed=8), readout=of)
        told = side(at / "told", ONCE, of, PASSES)
        there = side(at / "there", np.repeat(ONCE, PASSES), of)
        found[of] = FeatureSet(queries), told, there, side(at / "once", ONCE, of, repeats=False)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_passes_count_like_examples_that_stand_there_so_often(sides, name):
    queries, told, there, once = sides["mean_output" if name == "das" else "loss"]
    found, expected, other = (score_matrix(queries, x, preset(name)) for x in (told, there, once))
    largest, first = float(np.abs(found).max()), np.cumsum(PASSES) - PASSES
    np.testing.assert_allclose(found, expected[:, first], rtol=2e-4, atol=1e-5 * largest)
    assert np.abs(other - found).max() > 1e-3 * largest  # it makes a difference


def test_both_scores_are_shown(sides, tmp_path):
    queries, told, _, _ = sides["loss"]
    save_ranking(retrieve(queries, told, preset("grad_dot"), k=40), tmp_path)
    for line in csv.DictReader((tmp_path / "ranking.csv").open()):
        passes = PASSES[int(line["row"])]
        assert float(line["score_of_passes"]) == pytest.approx(passes * float(line["score"]))


@pytest.mark.parametrize("odd", ["often", 0, -1, None])
def test_what_is_no_number_of_passes_is_refused(tmp_path, odd):
    store = made(tmp_path / "x", drawn(3), metadata=[{"repeats": odd}, {}, {}])
    with pytest.raises(DminError, match=rf"repeats=.?{odd}.*collect\.repeats=false"):
        score_matrix(store, store, preset("trak"))
    assert FeatureSet(store, repeats=False).total == 3
