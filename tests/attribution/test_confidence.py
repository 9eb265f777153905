"""Error bars against many independent draws, and places that are sure or a coin's toss."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from attribution.made_stores import drawn, made, preset
from rich.console import Console

from dmin.attribution import DMin, FeatureSet, GradDot, retrieve
from dmin.attribution.confidence import parts_of, resampled, with_confidence
from dmin.attribution.ranking_files import records, save_ranking
from dmin.attribution.ranking_json import load_ranking
from dmin.attribution.ranking_table import ranking_table
from dmin.gradients.parameters import Parameter, Parameters
from dmin.sketches import BlockCyclic


@pytest.mark.parametrize(("draws", "steps"), [(2, 10), (4, 10), (1, 12)])
def test_the_error_is_the_spread_of_scores_that_are_measured_again(draws, steps):
    """Scores whose parts are drawn anew, once in many worlds and once by resampling one."""
    generator = np.random.default_rng(0)
    spread = generator.uniform(0.5, 1.5, size=(20, 1, 1)) / steps
    worlds = spread * generator.normal(size=(300, 20, draws, steps))
    true = worlds.sum((2, 3)).std(0)
    found = [
        resampled(parts.sum((1, 2)), parts, np.zeros(20), 200, generator).std(0)
        for parts in worlds[:60]
    ]
    assert np.sqrt(np.mean(np.square(found), axis=0)) == pytest.approx(true, rel=0.15)


@pytest.mark.parametrize("cosine", [0.0, 0.6, 0.95])
def test_the_sketchs_error_is_what_other_seeds_of_it_show(cosine, tmp_path):
    generator = torch.Generator().manual_seed(0)
    q, other = torch.nn.functional.normalize(torch.randn(2, 60, 70, generator=generator).flatten(1))
    other = torch.nn.functional.normalize(other - (other @ q) * q, dim=0)
    x = cosine * q + (1 - cosine**2) ** 0.5 * other
    found = []
    for seed in range(150):
        sketch = BlockCyclic(256, seed=seed).bind(Parameters((Parameter("w", (60, 70)),)))
        a, b = sketch.of({"w": torch.stack([q, x]).view(2, 60, 70)}).flatten(1)
        found.append(float(torch.nn.functional.cosine_similarity(a, b, dim=0)))
    rows = torch.stack([q, x]).view(2, 1, 1, 1, -1).numpy()
    store = FeatureSet(made(tmp_path / "pair", rows))
    _, spread = parts_of(store, store, DMin(), 0, np.array([1]))
    known = spread[0] * np.sqrt(rows.shape[-1] / 256)  # for a sketch of 256 numbers
    assert np.std(found) == pytest.approx(known, rel=0.2)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    place = tmp_path_factory.mktemp("stores")
    rows = drawn(60, draws=2, dim=64)
    rows[5] = rows[0] + 0.3 * drawn(1, draws=2, dim=64, seed=1)[0]
    rows[7] = rows[0] + 0.3 * drawn(1, draws=2, dim=64, seed=2)[0]
    return FeatureSet(made(place / "q", rows[:3])), FeatureSet(made(place / "t", rows[3:]))


def confident(sides, method, k=3, wide=12):
    ranking = retrieve(*sides, method, wide)
    return ranking, with_confidence(ranking, *sides, method, k)


def test_a_place_is_sure_where_no_other_comes_near(sides):
    wide, found = confident(sides, DMin(), k=2)
    assert found.scores.shape == (3, 2) and np.array_equal(found.scores, wide.scores[:, :2])
    assert set(found.train_ids[0]) == {"t-2", "t-4"}  # what was planted
    assert (found.stability[0] > 0.99).all()
    assert found.stability[1:].mean() < 0.7  # strangers all, whose order is chance
    assert (found.errors > 0).all()


def test_the_parts_add_up_to_the_score(sides):
    for method in (DMin(), GradDot(), preset("spectral_energy")):
        ranking = retrieve(*sides, method, 4)
        parts, spread = parts_of(*sides, method, 1, ranking.train_rows[1])
        assert parts.sum((1, 2)) == pytest.approx(ranking.scores[1], rel=1e-4)
        assert (spread > 0).all() == (method.name == "dmin")


def test_it_is_kept_shown_and_read_back(sides, tmp_path):
    _, found = confident(sides, DMin())
    save_ranking(found, tmp_path)
    rows = list(csv.DictReader((tmp_path / "ranking.csv").open()))
    assert float(rows[0]["error"]) == pytest.approx(found.errors[0, 0])
    assert float(rows[0]["stability"]) == pytest.approx(found.stability[0, 0])
    again = load_ranking(tmp_path)
    assert np.array_equal(again.errors, found.errors)
    document = json.loads((tmp_path / "ranking.json").read_text())
    assert document["rankings"][0]["queries"][0]["examples"][0]["stability"] == pytest.approx(1)
    page = Console(width=200, file=io.StringIO())
    page.print(ranking_table(found))
    assert "±" in page.file.getvalue() and "100 %" in page.file.getvalue()


def test_opponents_have_it_too_and_methods_that_do_not_add_up_have_none(sides, tmp_path):
    from dmin.attribution.search.selection import Selection

    ranking = retrieve(*sides, DMin(), 12, selection=Selection(order="opponents"))
    found = with_confidence(ranking, *sides, DMin(), 3)
    assert (found.stability > 0).all()
    from dmin.attribution import Random

    ranking = retrieve(*sides, Random(), 12)
    found = with_confidence(ranking, *sides, Random(), 3)
    assert found.errors is None and found.scores.shape == (3, 3)
    assert "error" not in records(found)[0]
