"""A report as its reader meets it: its page in a browser, its pictures, one colour a method."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from browser import broken_everywhere, broken_laws, chromium, opened
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from dmin.evaluation.report.page import save_page
from dmin.evaluation.report.plots import colours, forest, path, removal_curves
from dmin.evaluation.report.results import Cell, Cost, Report, Row, compared
from dmin.runtime.colours import method_colours

METHODS = ("random", "pixel_l2", "dmin", "grad_dot", "trak", "spectral", "das", "cg")
LONG = "a_method_of_somebody_with_a_name_that_hardly_ends"
PLACES = [
    ("generated", "subsets", "LDS"),
    ("generated", "class_out", "leave-out ρ"),
    ("held-out", "label", "mAP"),
    ("held-out", "a second ground truth with a name", "mAP"),
    ("copies of training images, made noisy", "source", "recall@1"),
    ("copies of training images, made noisy", "source", "recall@10"),
    *(("generated", "union", f"union@{k} %") for k in (1, 2, 5, 10, 20, 50, 100)),
]


@pytest.fixture(scope="module")
def report():
    random = np.random.default_rng(0)
    rows = [Row(name) for name in (*METHODS, LONG)]
    rows += [Row(m, tuned="retraining", settings="α = 10") for m in ("trak", "spectral", LONG)]
    rows += [Row("dmin", control=control) for control in ("untrained", "soft-max")]
    cells = []
    for place in PLACES:
        for number, row in enumerate(rows):
            # Methods that are nearly alike in cost and worth: labels would lie on each other.
            values = 0.5 + 0.02 * number + 0.1 * random.normal(size=30)
            reads = "" if row.method in ("random", "pixel_l2") else "gradients"
            cost = Cost(4096 if reads else 0, 0.1, 1e-3 * 1.1**number, reads)
            found = values[random.integers(30, size=(50, 30))].mean(1)
            cells.append(Cell(*place, row, values, found, cost))
        for name, value in (("ceiling", 0.9), ("one seed", 0.88)):
            values = np.full(30, value)
            cells.append(Cell(*place, Row(name, control="reference"), values, np.full(50, value)))
    tried = [
        {"method": m, "alpha": a, "p": p, "held-out/label/mAP": 0.1 * p + 0.02 * a**0.3}
        for m in ("trak", "spectral", LONG)
        for a in (0.01, 0.1, 0.13, 1.0, 10.0, 100.0)
        for p in (0.5, 1.0)
    ]
    notes = {"machine": "two cores", "what it took": "a word " * 30}
    return Report(compared(cells, "dmin"), tried, {LONG: "needs " * 40}, "dmin", notes)


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def page(browser, report, tmp_path_factory):
    path = save_page(report, tmp_path_factory.mktemp("page") / "results.html")
    with opened(browser, path) as shown:
        yield shown


def test_the_page_keeps_the_laws_of_layout(page):
    page.get_by_label("with controls").check()
    assert broken_everywhere(page) == []


def test_a_small_report_keeps_them_as_well(browser, report, tmp_path):
    kept = [r for r in report.results if r.metric == "LDS" and r.method in ("dmin", "random")]
    small = save_page(Report(kept), tmp_path / "results.html")
    with opened(browser, small) as shown:
        assert broken_everywhere(shown) == []


def test_a_method_has_one_colour_wherever_it_is_drawn(page, report):
    page.set_viewport_size({"width": 1440, "height": 900})
    broken_laws(page)  # waits until all is drawn
    drawn = page.evaluate(
        """() => {
          const found = [...document.querySelectorAll('.legend span')]
            .filter((one) => one.querySelector('line'))
            .map((one) => [one.textContent, one.querySelector('line').getAttribute('stroke')]);
          const circles = [...document.querySelectorAll('.view svg circle')];
          const names = [...document.querySelectorAll('.view svg .hit')].map((_, i) =>
            document.querySelectorAll('.view svg text:not(.tick)[x="6"]')[i].textContent);
          return [...found, ...names.map((name, i) => [name, circles[i].getAttribute('stroke')])];
        }"""
    )
    seen = {}
    for name, colour in drawn:
        method = next(m for m in (*METHODS, LONG) if name.startswith(m[:20]))
        if "untrained" not in name and "soft-max" not in name:
            seen.setdefault(method, set()).add(colour)
    assert len(seen) == len(METHODS) + 1 and all(len(own) == 1 for own in seen.values()), seen
    assert len({*colours(report).values()}) == len(METHODS) + 1


def test_the_page_is_used_with_keys(page):
    page.locator("nav button").nth(2).focus()
    page.keyboard.press("Enter")
    assert page.locator("nav button[aria-current]").inner_text() == "union@1 %"
    head = page.locator("thead button").nth(1)
    head.focus()
    page.keyboard.press("Enter")
    assert page.locator("th[aria-sort] button").evaluate("(one) => one === document.activeElement")


def written(figure):
    """Where each text of a figure stands, in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = {id(t) for a in figure.axes if not a.get_visible() for t in a.findobj(Text)}
    for axes in figure.axes:  # ticks beyond the limits are made, and not drawn
        for axis in (axes.xaxis, axes.yaxis):
            drawn = {id(tick) for tick in axis._update_ticks()}
            if not axes.axison:
                drawn = set()
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden |= {id(t.label1) for t in ticks if id(t) not in drawn}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden:
            yield text.get_text(), text.get_window_extent()


@pytest.mark.parametrize("draw", [forest, removal_curves, path])
def test_no_labels_of_a_picture_lie_on_each_other(report, draw):
    figure = draw(report)
    wide, high = figure.canvas.get_width_height()
    texts = list(written(figure))
    assert len(texts) > 10
    for text, box in texts:
        assert box.x0 >= -1 and box.x1 <= wide + 1 and box.y0 >= -1 and box.y1 <= high + 1, text
    for (first, a), (second, b) in combinations(texts, 2):
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        down = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across < 1 or down < 1, f"{first!r} lies on {second!r}"


def test_a_method_has_the_colour_of_its_page_in_the_pictures(report):
    known = colours(report)
    curves = removal_curves(report).axes[0]
    for line in curves.get_lines():
        name = line.get_label().replace("\n", "").partition(",")[0]
        if name in known:
            assert line.get_color() == known[name].light
    renamed = replace(report, path=[])
    assert set(colours(renamed)) == set(known)


def test_colours_are_distinct_and_stand_out_from_their_paper():
    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for family in ("none", "gradient", "curvature", ""):
        found = method_colours({f"{family}{number}": family for number in range(9)}).values()
        assert family == "none" or len({one.light for one in found}) == 9
        for light, dark in found:
            assert 1.05 / (luminance(light) + 0.05) > 3
            assert (luminance(dark) + 0.05) / (luminance("#181d23") + 0.05) > 3
