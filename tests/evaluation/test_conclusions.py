"""The first paragraph of a report names the best for each purpose, and where it is not."""

from dataclasses import replace
from itertools import product

import numpy as np

from dmin.evaluation.report.conclusions import conclusions, summary
from dmin.evaluation.report.results import Cell, Cost, Report, Row, compared
from dmin.evaluation.report.tables import markdown

MEANS = {  # of mAP, at each task
    "random": (0.1, 0.1, 0.1),
    "dmin": (0.3, 0.3, 0.3),
    "broad": (0.8, 0.7, 0.5),
    "narrow": (0.2, 0.2, 0.9),
}


def report(means, dims=(None,), gain=0.0):
    generator, draws = (
        np.random.default_rng(0),
        np.random.default_rng(1).integers(50, size=(99, 50)),
    )
    cells = []
    for name, row in means.items():
        for (task, mean), dim in product(zip("abc", row, strict=True), dims):
            values = mean + 0.01 * generator.normal(size=50) + gain * (dim == dims[-1])
            found = values[draws].mean(1)
            cost = Cost(reads="gradients")
            cells.append(Cell(task, "source", "mAP", Row(name), values, found, cost, dim))
    return Report(compared(cells, "dmin"))


def test_it_names_the_best_for_a_purpose_and_who_is_better_where():
    said = summary(report(MEANS))
    assert "One for all: broad is best" in said and "on 2 of 3 measures; dmin on 0" in said
    advice = said.partition("comes from: ")[2]
    assert advice.startswith("broad, with mAP .80; dmin .30 (a); mAP .70; dmin .30 (b); mAP .50;")
    assert "mAP .50; there narrow is better, .90; dmin .30 (c)" in advice
    assert advice.count("is better") == 1


def test_what_no_method_finds_is_said():
    found = report({name: (*row[:2], 0.1) for name, row in MEANS.items()})
    assert "No method is better than chance at c, mAP." in summary(found)
    *others, last = conclusions(found)
    assert "which is no better than chance" in last.text
    assert not any("chance" in other.text for other in others)


def test_where_nothing_is_found_at_all_that_is_what_is_said():
    said = summary(report(dict.fromkeys(MEANS, (0.1, 0.1, 0.1))))
    assert said.startswith("Nothing that was measured is found better than by chance.")


def test_of_several_sizes_of_the_sketch_the_first_is_spoken_of():
    better_when_small = report(MEANS, dims=(4096, 256), gain=0.1)
    assert "on 2 of 3 measures" in summary(better_when_small)
    assert {r.dim for r in better_when_small.results if r.best} == {4096, 256}


def test_a_value_of_the_data_ends_no_cell_of_a_table():
    odd = "a | b\n| c"
    (result, *_) = report({"random": (0.1,) * 3, "dmin": (0.3,) * 3}).results
    found = replace(result, metric=f"mAP, {odd}", method="x\ny")
    *_, head, rule, line, _ = markdown(Report([found])).partition("## What each")[0].splitlines()
    assert head == r"| method | mAP, a \| b \| c |"
    assert rule == "|---|---|" and line.startswith("| x y | ")
