"""The whole table on real digits: methods × ground truths, their controls, and what is written."""

import csv
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluation.contexts import small_context
from PIL import Image

from dmin.attribution import DAS, DMin, JourneyTRAK, Method, PixelL2, Random, Spectral
from dmin.data import Example, Examples
from dmin.data.digits import Digits
from dmin.evaluation import (
    Benchmark,
    GroundTruth,
    Report,
    SameColumn,
    SameLabel,
    SelfInfluence,
    Source,
    Task,
    Tuning,
)
from dmin.evaluation.report.files import save
from dmin.evaluation.report.results import Cell, Row, compared
from dmin.evaluation.report.tables import markdown, terminal
from dmin.queries import Planted
from dmin.runtime.errors import DminError


class Brightness(GroundTruth):
    """A user's own: darker examples matter more. No more than this is needed."""

    ranks_only = False

    def prepare(self, context, queries):
        images = [context.train.image(id) for id in context.train.store.ids]
        self.dark = np.array([-image.mean().item() for image in images])

    def measure(self, scores):
        return {"darkness": np.array([np.corrcoef(row, self.dark)[0, 1] for row in scores])}


class Loudest(Method):
    """A user's own method: the norm of the gradient, whatever the query."""

    name = "loudest"

    def score(self, queries, train):
        return train.norms["loss"].sum((1, 2, 3)).expand(len(queries.ids), -1)


@pytest.fixture(scope="module")
def sixty():
    digits = Digits("train").examples[:60]
    return Examples(
        [
            Example(e.id, e.image, e.label, None, {"mislabelled": i < 4})
            for i, e in enumerate(digits)
        ]
    )


@pytest.fixture(scope="module")
def context(ddpm, sixty, tmp_path_factory):
    return small_context(ddpm, sixty, tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="module")
def report(context):
    heldout = Digits("heldout").examples
    five = SameLabel(["precision@5", "mAP"])
    tasks = {
        "copies": Task({"source": Source()}, Planted("exact", count=8)),
        "held-out": Task({"label": five, "own": Brightness()}, Examples(heldout[:12])),
        "self": Task({"marked": SelfInfluence()}),
        "tune": Task({"label": five}, Examples(heldout[20:40])),
    }
    methods = {
        "random": Random(),
        "pixel_l2": PixelL2(),
        "dmin": DMin(),
        "spectral": Spectral(),
        "loudest": Loudest(),
        "das": DAS(),
        "journey_trak": JourneyTRAK(),
    }
    tuning = Tuning({"planted": "tune/label/mAP"}, alpha=(0.1, 10.0), p=(1.0,), watch=["copies"])
    benchmark = Benchmark(tasks, tuning=tuning, untrained=True, transforms=True)
    return benchmark.run(context, methods)


def find(report, name, metric, task):
    return next(r for r in report.results if (r.name, r.metric, r.task) == (name, metric, task))


def test_copies_are_found_first_by_likeness_and_not_by_chance(report):
    for name in ("dmin", "pixel_l2", "spectral"):
        assert find(report, name, "recall@1", "copies").mean == 1
    assert find(report, "random", "recall@1", "copies").mean < 0.3


def test_every_cell_is_inside_its_interval_and_has_its_controls(report):
    assert all(r.low - 1e-9 <= r.mean <= r.high + 1e-9 for r in report.results)
    names = {r.name for r in report.results}
    assert {"dmin, untrained", "dmin, soft-max", "spectral, tuned on planted, squared"} <= names
    assert "pixel_l2, untrained" not in names
    # Where only the order matters, a monotone transform would repeat the row.
    assert {r.metric for r in report.results if r.control == "soft-max"} == {"darkness"}


def test_what_fitting_found_is_reported_and_printed(report):
    note = report.fits["spectral, tuned on planted, curvature"]
    assert "of the energy; effective dimension" in note
    for text in (markdown(report), terminal(report).markup):
        assert f"spectral, curvature: {report.fits['spectral, curvature']}" in text


def test_a_method_that_cannot_be_measured_is_left_out_with_its_reason(report):
    assert "das" not in {r.method for r in report.results}
    assert "readouts" in report.left_out["das"]
    assert "queries.trajectory=10" in report.left_out["journey_trak"]


def test_tuning_takes_the_best_point_of_its_own_task_and_reports_it_nowhere(report):
    assert "tune" not in {r.task for r in report.results}
    points = {p["alpha"]: p["tune/label/mAP"] for p in report.path if p["method"] == "spectral"}
    assert sorted(points) == [0.1, 10]
    chosen = find(report, "spectral, tuned on planted", "mAP", "held-out").settings
    assert chosen == f"alpha = {max(points, key=points.get):g}, p = 1"
    assert all("copies/source/recall@1" in p for p in report.path)


def test_a_point_of_the_path_is_the_method_with_these_settings(report, context):
    from dmin.attribution import score_matrix
    from dmin.evaluation.metrics import measure

    queries = context._sides["tune", False]
    scores = score_matrix(queries, context.train, Spectral(alpha=10.0, p=1.0))
    truth = SameLabel(["mAP"])
    truth.prepare(context, queries)
    expected = measure("mAP", scores, truth._relevant).mean()
    point = next(p for p in report.path if p["alpha"] == 10 and p["method"] == "spectral")
    assert point["tune/label/mAP"] == pytest.approx(expected, abs=1e-6)


def test_joined_queries_score_as_they_do_alone(report, context):
    from dmin.attribution import score_matrix
    from dmin.evaluation.scoring import Joined

    sides = [context._sides[name, False] for name in ("copies", "held-out")]
    together = score_matrix(Joined(sides), context.train, Spectral())
    alone = [score_matrix(side, context.train, Spectral()) for side in sides]
    assert np.allclose(together, np.concatenate(alone), atol=1e-5)
    assert Joined(sides).block([3, 9], PixelL2.requires).images.shape[0] == 2


def test_a_users_own_ground_truth_and_method_have_their_rows(report):
    assert find(report, "loudest", "darkness", "held-out").queries == 12
    # The same for every query, so its mean over queries has no interval.
    row = find(report, "loudest", "darkness", "held-out")
    assert row.high - row.low < 1e-6


def test_differences_are_paired_and_only_real_leads_are_best():
    generator = np.random.default_rng(0)
    common = generator.normal(size=200)

    def cell(name, shift, control=""):
        values = common + shift + 0.01 * generator.normal(size=200)
        draws = np.random.default_rng(1).integers(200, size=(300, 200))
        return Cell("t", "g", "m", Row(name, control=control), values, values[draws].mean(1))

    cells = [cell("dmin", 0), cell("better", 0.1), cell("same", 0.1), cell("top", 1, "untrained")]
    found = {r.method: r for r in compared(cells, "dmin")}
    assert found["better"].better and not found["better"].worse
    assert found["better"].high - found["better"].low > 0.1  # alone, it could not be distinguished
    assert found["better"].best and found["same"].best and not found["dmin"].best
    assert not found["top"].best  # a control is never the best method
    assert found["dmin"].difference is None


def test_everything_is_written_and_can_be_read_back(report, tmp_path):
    files = save(report, tmp_path)
    assert all(file.is_file() for file in files)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [float(r["mean"]) for r in rows] == [
        pytest.approx(r.mean, rel=1e-3, abs=1e-9) for r in report.results
    ]
    again = Report.load(tmp_path)
    assert [r.name for r in again.results] == [r.name for r in report.results]
    assert [r.best for r in again.results] == [r.best for r in report.results]
    assert len(again.path) == len(report.path)
    text = (tmp_path / "results.md").read_text()
    assert "### held-out (12 queries)" in text and "Left out" in text and "das:" in text
    pixels = np.asarray(Image.open(tmp_path / "results.png").convert("L"))
    assert pixels.std() > 10


def test_the_page_needs_nothing_else_and_lets_no_markup_in(report, tmp_path):
    report.left_out["<b>"] = "</script><script>alert(1)</script>"
    save(report, tmp_path)
    del report.left_out["<b>"]
    page = (tmp_path / "results.html").read_text()
    assert page.count("<script>") == 1 and "alert(1)</script>" not in page
    assert not re.search(r"\{\{[A-Z_]+\}\}", page)
    assert not re.search(r"(src|href)=[\"']?http", page)


def test_a_lead_within_chance_is_not_bold(report):
    from dmin.evaluation.report.tables import cell

    r = find(report, "random", "mAP", "held-out")
    assert "**" not in cell(r)
    for r in report.results:
        if "**" in cell(r):
            assert r.best and r.difference_low > 0


def test_smaller_sketches_are_folded_and_store_and_pictures(ddpm, sixty, tmp_path):
    context = small_context(ddpm, sixty, tmp_path, dim=512)
    tasks = {"copies": Task({"source": Source(["recall@1", "MRR"])}, Planted("exact", count=8))}
    found = Benchmark(tasks, dims=(512, 256)).run(context, {"dmin": DMin(), "pixel_l2": PixelL2()})
    sizes = [(r.method, r.dim, r.bytes) for r in found.results if r.metric == "MRR"]
    assert sizes == [("dmin", 512, 2048), ("pixel_l2", 512, 0), ("dmin", 256, 1024)]
    text = markdown(found)
    assert all(f"\n| {line} |" in text for line in ("dmin, k = 512", "dmin, k = 256", "pixel_l2"))


def test_the_papers_tables_have_a_column_a_subset_and_what_it_costs(ddpm, sixty, tmp_path):
    truth = SameColumn("label", ["precision@5", "precision@10"], each=True)
    tasks = {"subsets": Task({"subset": truth}, Examples(sixty.examples[:20]))}
    context = small_context(ddpm, sixty, tmp_path)
    found = Benchmark(tasks).run(context, {"dmin": DMin(), "random": Random()})
    files = save(found, tmp_path / "report")
    text = (tmp_path / "report" / "results.md").read_text()
    labels = sorted({str(e.label) for e in sixty.examples[:20]})
    assert f"| method | KiB an example | ms a query | all | {' | '.join(labels)} |" in text
    assert all(file.is_file() for file in files)


def test_any_column_can_tell_what_is_right(ddpm, digits, tmp_path):
    marked = [
        Example(e.id, e.image, e.label, None, {"source": "a" if i % 3 else "b"})
        for i, e in enumerate(digits.examples[:9])
    ]
    side = small_context(ddpm, Examples(marked), tmp_path).train
    found = SameColumn("source").relevant(side.store, side.store)
    expected = [[(i % 3 == 0) == (j % 3 == 0) for j in range(9)] for i in range(9)]
    assert found.tolist() == expected
    truth = SameColumn("source", ["precision@3"], each=True)
    truth.prepare(SimpleNamespace(train=side), side)
    scores = 2 * np.eye(9) + np.array([i % 3 > 0 for i in range(9)])
    each = truth.measure(scores)  # "a" is always first, but for the query itself
    assert (each["precision@3, a"] == 1).all() and len(each["precision@3, a"]) == 6
    assert each["precision@3, b"] == pytest.approx(1 / 3) and len(each["precision@3"]) == 9
    with pytest.raises(DminError, match="have no 'source_id'"):
        Source().relevant(side.store, side.store)


@pytest.mark.parametrize("metric", ["tune/label", "nowhere/label/mAP", "tune/other/mAP"])
def test_a_criterion_that_is_not_there_is_refused(metric):
    tasks = {"tune": Task({"label": SameLabel()}, Planted())}
    with pytest.raises(DminError, match="write task/truth/metric"):
        Benchmark(tasks, tuning=Tuning({"planted": metric}))


def test_retraining_needs_a_recipe(context):
    from dmin.evaluation import LDS

    tasks = {"copies": Task({"subsets": LDS()}, Planted("exact", count=2))}
    with pytest.raises(DminError, match="Set train=<choice>"):
        Benchmark(tasks).run(context, {"random": Random()})
    assert torch.is_grad_enabled()
