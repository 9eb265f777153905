"""The whole table on real digits, and what the ground truths refuse."""

import csv

import numpy as np
import pytest
from PIL import Image

from dmin.attribution import DMin, PixelL2, Random, Side
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Example, Examples
from dmin.errors import DminError
from dmin.evaluation import Benchmark, SameColumn, SameLabel, Source, Task, report
from dmin.queries import Planted
from dmin.sketches import BlockCyclic
from dmin.timesteps import Stratified


@pytest.fixture(scope="module")
def collected(ddpm, tmp_path_factory):
    def collect(dataset):
        collector = GradientCollector(ddpm, BlockCyclic(256), Stratified(2))
        trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
        path = tmp_path_factory.mktemp("stores") / "store"
        return Side(collector.collect(dataset, path, trainer=trainer), dataset)

    return collect


@pytest.fixture(scope="module")
def sixty(digits):
    from dmin.data.digits import Digits

    return Examples(Digits("train").examples[:60])


@pytest.fixture(scope="module")
def results(collected, sixty):
    from dmin.data.digits import Digits

    class FirstFive(SameLabel):
        metrics = ("precision@5", "mAP")

    tasks = {
        "copies": Task(Planted("exact", count=8), Source()),
        "held-out": Task(Examples(Digits("heldout").examples[:12]), FirstFive()),
    }
    methods = {"random": Random(), "pixel_l2": PixelL2(), "dmin": DMin()}

    def queries(name, task):
        planted = isinstance(task.queries, Planted)
        return collected(task.queries.plant(sixty) if planted else task.queries)

    return Benchmark(tasks, methods).run(collected(sixty), queries, lambda text: None)


def test_copies_are_found_first_by_likeness_and_not_by_chance(results):
    found = {(r.method, r.metric): r.estimate.mean for r in results if r.task == "copies"}
    assert found["dmin", "recall@1"] == found["pixel_l2", "recall@1"] == 1
    assert found["random", "recall@1"] < 0.3


def test_every_cell_is_there_and_inside_its_interval(results):
    assert len(results) == 3 * 3 + 3 * 2
    assert all(r.estimate.low <= r.estimate.mean <= r.estimate.high for r in results)


def test_the_report_is_written(results, tmp_path):
    report.save_csv(results, tmp_path / "results.csv")
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [float(r["mean"]) for r in rows] == [
        pytest.approx(r.estimate.mean, abs=1e-4) for r in results
    ]
    text = report.markdown(results)
    assert "### copies (8 queries)" in text and "| dmin | 1.000 (1.00–1.00)" in text
    report.save_plot(results, tmp_path / "results.png")
    pixels = np.asarray(Image.open(tmp_path / "results.png").convert("L"))
    assert pixels.shape[1] == 1350 and pixels.std() > 10
    assert [table.row_count for table in report.tables(results)] == [3, 3]


def test_any_column_can_tell_what_is_right(collected, digits):
    marked = [
        Example(e.id, e.image, e.label, None, {"source": "a" if i % 3 else "b"})
        for i, e in enumerate(digits.examples[:9])
    ]
    side = collected(Examples(marked))
    found = SameColumn("source").relevant(side.store, side.store)
    expected = [[(i % 3 == 0) == (j % 3 == 0) for j in range(9)] for i in range(9)]
    assert found.tolist() == expected


def test_a_ground_truth_needs_its_column(collected, digits):
    unlabelled = Examples([Example(e.id, e.image, 0) for e in digits.examples[:2]])
    train = collected(digits)
    queries = collected(unlabelled)
    with pytest.raises(DminError, match="have no 'source_id'"):
        Source().relevant(queries.store, train.store)
