"""Error bars against many sketches and draws, and places that are sure or a coin's toss."""

import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attribution.made_stores import TIMES, drawn, made, preset
from rich.console import Console
from scipy.stats import t as student

from dmin.attribution import DMin, FeatureSet, GradDot, confidence, coverage, retrieve, score_matrix
from dmin.attribution.confidence import (
    independent_draws,
    noise_deviations,
    sketch_deviations,
    spread,
    widened,
    with_confidence,
)
from dmin.attribution.ranking_files import save_ranking
from dmin.attribution.ranking_json import load_ranking
from dmin.attribution.ranking_table import ranking_table
from dmin.attribution.search.selection import Selection
from dmin.gradients.parameters import Parameter, Parameters
from dmin.sketches import BlockCyclic
from dmin.store import Layout


@pytest.fixture(autouse=True)
def every_bar(monkeypatch):
    """Show bars of stores that name no sketch."""
    monkeypatch.setattr(confidence, "bars_of", lambda *_: {"sketch", "total"})


class Powered(DMin):
    """DMin's score raised to a power, which is no inner product."""

    def transform_query(self, queries):
        return (super().transform_query(queries),)

    def score(self, queries, train):
        return queries[0].scores(train) ** 4


class Unwritten(FeatureSet):
    """A side whose rows ``[n, D, T, G, k]`` lie in memory."""

    def __init__(self, rows):
        layout = Layout(("loss",), rows.shape[1], TIMES, ("all",), rows.shape[-1])
        store = SimpleNamespace(
            layout=layout,
            ids=[str(row) for row in range(len(rows))],
            manifest=SimpleNamespace(features={}),
            rows=lambda _, chosen: rows[chosen],
            norms=lambda _: np.ones(rows.shape[:4], np.float32),
        )
        super().__init__(store)


@pytest.mark.parametrize(
    ("method", "cosine"),
    [(DMin(), 0.0), (DMin(), 0.8), (GradDot(), 0.0), (Powered(), 0.8)],
    ids=["dmin-low", "dmin-high", "dot", "power"],
)
def test_the_sketch_error_is_what_other_seeds_show(method, cosine):
    """Of gradients at three timesteps that are alike, so that errors of one map add up."""
    generator = torch.Generator().manual_seed(0)
    q, other = torch.nn.functional.normalize(torch.randn(2, 4200, generator=generator))
    other = torch.nn.functional.normalize(other - (other @ q) * q, dim=0)
    drift = torch.randn(2, 3, 4200, generator=generator) / 4200**0.5
    full = torch.stack([q, cosine * q + (1 - cosine**2) ** 0.5 * other])[:, None] + 0.3 * drift
    found, told = [], []
    for seed in range(150):
        sketch = BlockCyclic(256, seed=seed).bind(Parameters((Parameter("w", (60, 70)),)))
        rows = sketch.of({"w": full.view(6, 60, 70)}).view(2, 1, 3, 1, 256).numpy()
        sides = [Unwritten(rows[i : i + 1]) for i in (0, 1)]
        asked = method.transform_query(sides[0].block([0], method.requires))
        found.append(float(method.score(asked, sides[1].block([0], method.requires))))
        told.append(spread(sketch_deviations(*sides, method, 0, np.arange(1)).values)[0])
    assert np.sqrt(np.mean(np.square(told))) == pytest.approx(np.std(found), rel=0.25)


@pytest.mark.parametrize("draws", [2, 4])
def test_the_noise_error_of_a_sum_is_that_of_its_means(draws, tmp_path):
    rows = drawn(9, draws=draws, dim=64)
    q, t = (FeatureSet(made(tmp_path / n, r)) for n, r in (("q", rows[:1]), ("t", rows[1:])))
    scores = score_matrix(q, t, DMin())[0].astype(np.float64)
    unit = rows[:, :, :, 0] / np.linalg.norm(rows[:, :, :, 0], axis=-1, keepdims=True)
    parts = np.einsum("dtk,ndtk->ndt", unit[0], unit[1:])
    true = np.sqrt((parts.var(1, ddof=1) / draws).sum(1))
    found = noise_deviations(q, t, DMin(), 0, np.arange(8), scores)
    told = spread(found.values)
    assert told == pytest.approx(true, rel=0.35)
    assert np.mean(told / true) == pytest.approx(1, rel=0.15)
    freedom = 3 * (draws - 1)
    assert found.freedom == freedom
    assert spread(widened([found])) == pytest.approx(told * student.ppf(0.975, freedom) / 1.96)


def test_antithetic_draws_count_in_pairs_and_one_draw_has_no_total(sides, monkeypatch):
    assert independent_draws(sides[1]) == 2
    for side in sides:
        monkeypatch.setitem(side.store.manifest.features, "noise", {"antithetic": True})
    assert independent_draws(sides[1]) == 1
    _, found = confident(sides, DMin())
    assert found.total_errors is None and found.errors[0] == "sketch"


def test_what_was_not_measured_to_hold_is_not_shown(sides, monkeypatch):
    monkeypatch.setattr(confidence, "bars_of", coverage.bars_of)
    _, found = confident(sides, DMin())
    assert found.errors is found.stability is found.tiers is None
    assert "those of dmin with sketch=unknown were not measured" in found.notes["error bars"]
    assert "pixel_l2 reads none" in coverage.why_none("pixel_l2", {}, sketched=False)
    assert not coverage.bars_of("dmin", {"sketch": {"family": "factored"}})
    assert not coverage.bars_of("pixel_l2", {"sketch": {"family": "auto"}})


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
    assert (found.sketch_errors > 0).all() and (found.total_errors > found.sketch_errors).all()


@pytest.mark.parametrize(
    "method", [DMin(), GradDot(), preset("spectral"), preset("trak")], ids=lambda m: m.name
)
def test_products_without_a_residue_are_what_scoring_them_again_gives(sides, method, monkeypatch):
    method.fit(sides[1])
    quick = sketch_deviations(*sides, method, 1, np.arange(9)).values
    monkeypatch.setattr(confidence, "InnerProduct", type("None", (), {}))
    slow = sketch_deviations(*sides, method, 1, np.arange(9)).values
    assert quick == pytest.approx(slow, abs=1e-5 * np.abs(slow).max())


def test_it_is_kept_shown_and_read_back(sides, tmp_path):
    _, found = confident(sides, DMin())
    save_ranking(found, tmp_path)
    rows = list(csv.DictReader((tmp_path / "ranking.csv").open()))
    assert float(rows[0]["sketch_error"]) == pytest.approx(found.sketch_errors[0, 0])
    assert float(rows[0]["total_error"]) == pytest.approx(found.total_errors[0, 0])
    assert float(rows[0]["stability"]) == pytest.approx(found.stability[0, 0])
    again = load_ranking(tmp_path)
    assert np.array_equal(again.sketch_errors, found.sketch_errors)
    assert np.array_equal(again.total_errors, found.total_errors)
    document = json.loads((tmp_path / "ranking.json").read_text())
    assert document["rankings"][0]["queries"][0]["examples"][0]["stability"] == pytest.approx(1)
    page = Console(width=200, file=io.StringIO())
    page.print(ranking_table(found))
    assert "total" in page.file.getvalue() and ">99 %" in page.file.getvalue()


def test_opponents_have_it_too(sides):
    ranking = retrieve(*sides, DMin(), 12, selection=Selection(order="opponents"))
    assert (with_confidence(ranking, *sides, DMin(), 3).stability > 0).all()
