"""Figures of the pages are those of the committed tables, and what leads is told where it loses."""

import re

import pytest
from claims import MARKED, PAGES, ROOT, remade, results

from dmin.attribution.coverage import COVERED
from dmin.evaluation.report.conclusions import number
from dmin.runtime.escape import read_csv

NUMBER = r"[+−]?\d*\.\d+"
DIGITS, FULL = "experiments/digits/results.csv", "experiments/lds/full/results.parquet"
SHAPES = "experiments/shapes/{}/results.csv"
TEN, OWN = "generated_digits/label/precision@10", "{}/removal/removal@50 %"
LDS, CLASSES, SOURCE = "{}/subsets/LDS", "{}/class_out/leave-out ρ", "sources/source/precision@40"
FLIPPED, NOISY, PRINTS = (
    *("self/mislabelled/AUROC", "noisy_copies/source/recall@1"),
    "prints/source/mAP",
)
PLANTED, RETRAINED = "das, tuned on planted", "spectral_energy, tuned on retraining"


def of(place, *names):
    """Name the cells of some methods at one place."""
    return [(place, name, "mean") for name in names]


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
        [
            *(
                (TEN, name, field)
                for name in ("dmin", "pixel_l2")
                for field in ("mean", "low", "high")
            ),
            (TEN, "random", "mean"),
        ],
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
# The same of tables with a line a case: the line by its first columns, and the column.
COVERAGE, ARTISTS = "experiments/coverage/coverage.csv", "experiments/artists/results.csv"
CASES = [
    (
        *("README.md", "default sketch {} to {} (of the sketch), {} to {} (of sketch", COVERAGE),
        [
            ((bar, "dmin", "auto", cosines), "coverage")
            for bar in ("sketch", "total")
            for cosines in ("high", "low")
        ],
    ),
    (
        *("README.md", "`factored` covers {} at worst and shows none", COVERAGE),
        [(("sketch", "dmin", "factored", "high"), "coverage")],
    ),
    (
        *("README.md", "of the first five drawings, {} are by", ARTISTS),
        [(("trained", "dmin"), "P@5")],
    ),
    (
        *("README.md", "at most {} by image similarity", ARTISTS),
        [(("none", "ssim"), "P@5")],
    ),
]
LOSES = {"removal": "removal", "mislabelled": "wrong labels", "source": "noisy copies"}


def plain(page):
    return re.sub(r"\s+", " ", (ROOT / page).read_text())


@pytest.mark.parametrize(("page", "says", "table", "cells"), CLAIMS, ids=lambda v: str(v)[:40])
def test_a_claim_is_what_its_table_has(page, says, table, cells):
    pattern = re.escape(says).replace(r"\{\}", f"({NUMBER})")
    found = re.findall(pattern, plain(page))
    assert found, f"{page} does not say: {says}"
    lines = results(ROOT / table)
    for told in found:
        for text, (place, name, field) in zip(told if cells[1:] else [told], cells, strict=True):
            value = getattr(lines[tuple(place.split("/")), name], field)
            digits = len(text.partition(".")[2])
            assert float(text.replace("−", "-")) == float(f"{value:.{digits}f}"), (
                place,
                name,
                text,
            )


@pytest.mark.parametrize(("page", "says", "table", "cells"), CASES, ids=lambda v: str(v)[:40])
def test_a_claim_is_what_the_lines_of_its_table_have(page, says, table, cells):
    (told,) = re.findall(re.escape(says).replace(r"\{\}", f"({NUMBER})"), plain(page))
    lines = [list(line.items()) for line in read_csv(ROOT / table)]
    for text, (names, column) in zip(told if cells[1:] else [told], cells, strict=True):
        (line,) = (each for each in lines if tuple(v for _, v in each[: len(names)]) == names)
        value = float(dict(line)[column])
        assert float(text) == float(f"{value:.{len(text.partition('.')[2])}f}"), (names, text)


def test_every_figure_of_the_readme_that_cites_such_a_table_is_claimed():
    for row in (ROOT / "README.md").read_text().splitlines():
        if row.startswith("|") and re.search(r"experiments/(digits|lds|shapes)/", row):
            claimed = set()
            for page, says, *_ in CLAIMS:
                pattern = re.escape(says).replace(r"\{\}", f"({NUMBER})")
                for match in re.finditer(pattern, row) if page == "README.md" else ():
                    claimed |= {match.span(group) for group in range(1, match.re.groups + 1)}
            lacking = [m[0] for m in re.finditer(NUMBER, row) if m.span() not in claimed]
            assert not lacking, f"not in CLAIMS: {lacking} of {row[:60]}"


def test_what_is_said_to_lead_is_said_to_lose_where_dmin_or_pixels_are_ahead():
    text = next(row for row in plain("README.md").split("| ") if "`method=blend`, 128" in row)
    lines = results(ROOT / FULL)
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


def test_numbers_are_rounded_once():
    assert number(13.2531, "removal@50 %") == "+13.3 %" and number(0.975, "MRR") == ".97"
