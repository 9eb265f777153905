"""Figures of the pages are those of the committed tables, and what leads is told where it loses."""

import pytest
import torch
from claimed import CLAIMS as MORE, DIGITS, FORMED, LDS as FULL, PARTS
from claims import (
    EXPERIMENTS,
    MARKED,
    PAGES,
    ROOT,
    figures,
    number_at,
    plain,
    plainly,
    remade,
    results,
    told,
)
from torch.utils.flop_counter import FlopCounterMode

from dmin.attribution.coverage import COVERED
from dmin.evaluation.report.conclusions import number
from dmin.runtime.escape import read_csv
from experiments.bench import workloads
from experiments.scale import run as scale

SHAPES = "shapes/{}/results.csv"
TEN, OWN = "generated_digits/label/precision@10", "{}/removal/removal@50 %"
LDS, CLASSES, SOURCE = "{}/subsets/LDS", "{}/class_out/leave-out ρ", "sources/source/precision@40"
FLIPPED, NOISY, PRINTS = (
    *("self/mislabelled/AUROC", "noisy_copies/source/recall@1"),
    "prints/source/mAP",
)
PLANTED, RETRAINED = "das, tuned on planted", "spectral_energy, tuned on retraining"


def of(place, *names, fields=("mean",)):
    """Name the cells of some methods at one place."""
    return [f"{place.replace('/', ' ')} {name}/{field}" for name in names for field in fields]


def at(place, *names):
    """Name the cells of some methods at both kinds of queries, one kind after the other."""
    return [
        c
        for name in names
        for kind in ("generated", "heldout")
        for c in of(place.format(kind), name)
    ]


# Page, what it says with {} for each figure, the table, and the cells in this order.
CLAIMS = [
    (
        *("README.md", "recall@1 = {} of 100", DIGITS),
        of("exact_copies/source/recall@1", "dmin"),
    ),
    (
        *("README.md", "DMin {} ({}–{}), pixel distance {} ({}–{}), chance {}, on 100", DIGITS),
        of(TEN, "dmin", "pixel_l2", fields=("mean", "low", "high")) + of(TEN, "random"),
    ),
    (
        "README.md",
        "LDS {} of an attainable {} on generated digits, {} of {} on held-out ones (DMin {}, {}; "
        "`spectral_energy`, tuned by retraining, {}, {})",
        FULL,
        [
            *of(LDS.format("generated"), "blend", "ceiling"),
            *of(LDS.format("heldout"), "blend", "ceiling"),
            *at(LDS, "dmin", RETRAINED),
        ],
    ),
    (
        *("README.md", "left-out class ρ {} and {} (DMin {}, {})", FULL),
        at(CLASSES, "blend", "dmin"),
    ),
    (
        "README.md",
        "either source, precision@40 {} (DMin {}, pixels {}, the training loss alone {})",
        FULL,
        of(SOURCE, "blend", "dmin", "pixel_l2", "training_loss"),
    ),
    (
        "README.md",
        "(held out {} %, DMin {}, pixels {}, `unlearning` {}; generated {} %, DMin {}, `das` tuned "
        "on planted {})",
        FULL,
        of(OWN.format("heldout"), "blend", "dmin", "pixel_l2", "unlearning")
        + of(OWN.format("generated"), "blend", "dmin", PLANTED),
    ),
    (
        "README.md",
        "wrong labels (AUROC {}, DMin {}, the training loss {}) and noisy copies (recall@1 {}, "
        "DMin {}, pixels {})",
        FULL,
        of(FLIPPED, "blend", "dmin", "training_loss") + of(NOISY, "blend", "dmin", "pixel_l2"),
    ),
    (
        *("README.md", "mAP {} by `method=blend`, {} by `sharp_energy`, {} by DMin, {} by pixels"),
        SHAPES.format("lora"),
        of("generated/source/mAP", "blend", "sharp_energy", "dmin", "pixel_l2"),
    ),
    (
        *("README.md", "on a UNet {}, {}, {}, {}, and {} on an untrained", SHAPES.format("unet")),
        of(PRINTS, "blend", "sharp_energy", "dmin", "pixel_l2", "dmin, untrained"),
    ),
    (
        "README.md",
        "`dmin_unnormalised` leads with {} (DMin {}, `blend` {}, `sharp_energy` {}, pixels {})",
        SHAPES.format("captioned"),
        of(PRINTS, "dmin_unnormalised", "dmin", "blend", "sharp_energy", "pixel_l2"),
    ),
    (
        "experiments/lds/README.md",
        "pixels have {} and {} %, DMin on an *untrained* network {} and {} %, DMin {} and {} %",
        FULL,
        at(OWN, "pixel_l2", "dmin, untrained", "dmin"),
    ),
    (
        "experiments/lds/README.md",
        "({} % against {} %), held-out ones more after `unlearning` ({} % against {} %)",
        FULL,
        of(OWN.format("generated"), PLANTED, "blend")
        + of(OWN.format("heldout"), "unlearning", "blend"),
    ),
]
CLAIMS += MORE
LOSES = {"removal": "removal", "mislabelled": "wrong labels", "source": "noisy copies"}


@pytest.mark.parametrize(("page", "says", "table", "cells"), CLAIMS, ids=lambda v: str(v)[:40])
def test_a_claim_is_what_its_table_has(page, says, table, cells):
    found = list(told(says).finditer(plain(page)))
    assert found, f"{page} does not say: {says}"
    for match in found:
        for text, cell in zip(match.groups(), cells, strict=True):
            value = number_at(table, cell)
            assert plainly(text) == float(f"{value:.{len(text.partition('.')[2])}f}"), (text, cell)


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{each.name}" for each in sorted(ROOT.glob("docs/*.md")))]
)
def test_every_figure_is_claimed(page):
    text, spans = plain(page), []
    for _, says, *_ in (each for each in CLAIMS if each[0] == page):
        spans += [match.span() for match in told(says).finditer(text)]
    lacking = [
        text[max(0, start - 50) : end + 30]
        for start, end in figures(text)
        if not any(first <= start and end <= last for first, last in spans)
    ]
    assert not lacking, "\n".join(lacking)


def test_what_is_said_to_lead_is_said_to_lose_where_dmin_or_pixels_are_ahead():
    text = next(row for row in plain("README.md").split("| ") if "`method=blend`, 128" in row)
    lines = results(EXPERIMENTS / FULL)
    behind = {
        place
        for place, name in lines
        if name == "blend"
        and place[1] in LOSES
        and place[2] in ("removal@50 %", "AUROC", "recall@1")
        for other in ("dmin", "pixel_l2")
        if lines[place, other].mean > lines[place, name].mean
    }
    assert len(behind) == 3 and not [place for place in behind if LOSES[place[1]] not in text]


@pytest.mark.parametrize("page", [p for p in PAGES if MARKED.search(p.read_text())], ids=str)
def test_marked_tables_are_those_of_the_results(page):
    assert page.read_text() == remade(page), "PYTHONPATH=tests:. python -m claims"


def test_bars_are_shown_where_they_were_measured_to_hold():
    shown = {}
    for line in read_csv(ROOT / "experiments/coverage/shown.csv"):
        shown.setdefault(line["bar"], {})[line["method"]] = frozenset(line["sketches"].split(", "))
    assert {bar: methods for bar, methods in COVERED.items() if methods} == shown
    held = {}
    for line in read_csv(ROOT / "experiments/coverage/coverage.csv"):
        inside = 0.92 <= float(line["coverage"]) <= 0.98 and int(line["redraws"]) >= 500
        held.setdefault((line["bar"], line["method"], line["sketch"]), []).append(inside)
    found = {(b, m, s) for b, methods in shown.items() for m, ss in methods.items() for s in ss}
    sure = {cell for cell, both in held.items() if len(both) == 2 and all(both)}
    assert found == {(b, m, s) for b, m, s in sure if ("sketch", m, s) in sure}


def test_operations_of_a_forward_pass_are_those_that_torch_counts():
    for part, (forward, plain_gradients, _) in zip(PARTS, FORMED, strict=False):
        with torch.device("meta"):
            work = getattr(workloads, part.strip("/"))()
        with FlopCounterMode(display=False) as counted:
            work.network(**work.arguments, return_dict=False)
        assert round(counted.get_total_flops() / workloads.BATCH / 1e9, 1) == forward
        assert f" M | {forward} | {plain_gradients} | " in plain("docs/performance.md")


def test_what_is_computed_beyond_the_machines_is_what_the_script_computes():
    rows, table = scale.computed(scale.options([]))
    lines = [{name: str(value) for name, value in row._asdict().items()} for row in rows]
    assert lines == list(read_csv(EXPERIMENTS / "scale/results.csv"))
    assert (ROOT / "docs/scale.md").read_text() == scale.page(table)


def test_numbers_are_rounded_once():
    assert number(13.2531, "removal@50 %") == "+13.3 %" and number(0.975, "MRR") == ".97"
