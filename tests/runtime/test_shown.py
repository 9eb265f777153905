"""What objects say of themselves in a terminal and a notebook."""

import numpy as np
import pandas
import pytest

from dmin import Auto, BlockCyclic, Examples, GradientCollector
from dmin.attribution import Ranking
from dmin.attribution.ranking_rows import records
from dmin.collect import predict_trainer
from dmin.runtime.shown import Shown


class Odd(Shown):
    def facts(self):
        return {"path": "<script>alert(1)</script>\x1b[2J", "examples": 3}


@pytest.fixture
def ranking():
    ids, metadata = [["a", "b"]], [[{"label": 1}, {"label": 2}]]
    scores, parts = np.array([[1.5, 0.5]]), np.array([[[0.75, 0.75], [0.25, 0.25]]])
    rows, query = np.array([[4, 2]]), ["<b>query</b>"]
    return Ranking("dmin", (9.0, 1.0), query, [{"label": 1}], rows, ids, metadata, scores, parts)


def test_what_is_shown_is_no_code():
    assert repr(Odd()) == "Odd(path=<script>alert(1)</script>\\u001b[2J, examples=3)"
    html = Odd()._repr_html_()
    assert "&lt;script&gt;" in html and "<script>" not in html and "\x1b" not in html


def test_a_ranking_says_what_was_found_and_becomes_a_frame(ranking):
    assert repr(ranking) == (
        "Ranking(method=dmin, queries=1, k=2, candidates=None, scores=0.5 … 1.5)"
    )
    html = ranking._repr_html_()
    assert "&lt;b&gt;query" in html and "a: 1.5" in html and "<b>" not in html
    frame = ranking.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and frame.to_dict("records") == records(ranking)
    assert list(frame["id"]) == ["a", "b"] and list(frame["t0009"]) == [0.75, 0.25]


def test_models_sketches_and_stores_are_shown_by_what_defines_them(ddpm, digits, tmp_path):
    collector = GradientCollector(ddpm, BlockCyclic(dim=64, block=16))
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    few = Examples(digits.examples[:2])
    store = collector.collect(few, tmp_path / "store", trainer=trainer)
    assert "network=UNet2DModel, parameters=" in repr(ddpm) and "\n" not in repr(ddpm)
    assert repr(Auto(dim=512)).startswith("Auto(family=auto, dim=512, seed=0")
    assert f"path={store.path}" in repr(store) and "float16" in store._repr_html_()
