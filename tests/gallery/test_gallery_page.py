"""The gallery as its reader meets it: in a browser, at three widths, in light and dark."""

from dataclasses import replace

import numpy as np
import pytest
from browser import broken_everywhere, chromium, opened
from rankings import EVIL, TIMESTEPS, query_image, ranking, train_image, with_captions

from dmin.attribution.ranking import format_score
from dmin.gallery.html import save_html

SHOWN = "main h2"
OPEN = "#detail[open] h2"


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def page(browser, tmp_path):
    some = with_captions(ranking(), EVIL)
    path = save_html(some, query_image, train_image, tmp_path / "a.html", notes={"note": "noted"})
    with opened(browser, path) as shown:
        yield shown


def crowded():
    """Fifty examples a query, each with a long caption, forty columns, one of a long name."""
    some = with_captions(ranking(2, 50), "a digit written by hand, " * 40)
    many = {f"column_{number}": f"value {number}" for number in range(40)}
    many |= {"a_key_that_is_far_longer_than_any_column_of_a_table_should_ever_be_named": "x" * 300}
    rows = [[{**one, **many} for one in row] for row in some.train_metadata]
    return replace(some, train_metadata=rows, query_metadata=[{**many, "label": 3}] * 2)


def unsplit():
    return replace(ranking(1, 1), contributions=None, timesteps=(), query_metadata=[{}])


def sure():
    some = ranking(2)
    return replace(
        some,
        errors=np.full_like(some.scores, 0.01),
        stability=np.full_like(some.scores, 0.97),
        groups=("first", "second"),
        group_contributions=some.scores[:, :, None] * [0.3, 0.7],
    )


@pytest.mark.parametrize("made", [ranking, crowded, unsplit, sure])
def test_pages_keep_the_laws_of_layout(browser, tmp_path, made):
    path = save_html(made(), query_image, train_image, tmp_path / "a.html")
    with opened(browser, path) as page:
        assert broken_everywhere(page) == []
        page.locator(".card").first.click()
        assert broken_everywhere(page) == []
        page.keyboard.press("Escape")
        page.keyboard.press("?")
        assert broken_everywhere(page) == []


def test_page_shows_a_query_with_its_examples(page):
    some = ranking()
    assert page.inner_text(SHOWN) == "query-0"
    assert page.locator(".card").count() == 12
    assert page.locator(".card svg rect").count() == 12 * 5
    assert page.locator(".card svg .against").count() == 12
    assert page.locator(".card .score").first.inner_text() == format_score(some.scores[0, 0])
    assert page.locator("main img, nav img").count() == 1 + 12 + 3
    # All pictures have loaded, so their encoding is sound.
    widths = "[...document.querySelectorAll('main img')].map((one) => one.naturalWidth)"
    assert page.evaluate(widths) == [8] * 13
    assert "noted" in page.inner_text("header")


def test_page_is_walked_with_keys(page):
    some = ranking()
    for key, shown in [
        ("j", "query-1"),
        ("ArrowRight", "query-2"),
        ("j", "query-2"),
        ("k", "query-1"),
        ("ArrowUp", "query-0"),
        ("ArrowDown", "query-1"),
    ]:
        page.keyboard.press(key)
        assert page.inner_text(SHOWN) == shown
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.inner_text(OPEN) == some.train_ids[1][1]
    page.keyboard.press("ArrowRight")
    assert page.inner_text(OPEN) == some.train_ids[1][2]
    rows = page.locator(".steps tbody tr").all_inner_texts()
    assert some.contributions is not None
    for row, timestep, part in zip(rows, TIMESTEPS, some.contributions[1, 2], strict=True):
        name, number = row.split()
        assert name == str(timestep)
        assert float(number.replace("−", "-")) == pytest.approx(part, abs=1e-4)
    page.keyboard.press("Escape")
    assert page.locator(OPEN).count() == 0
    focused = page.locator(".card:focus")
    assert some.train_ids[1][2] in (focused.get_attribute("aria-label") or "")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()


def test_page_filters_by_id_and_label(page):
    some = ranking()
    wanted = some.train_ids[1][4]
    page.keyboard.press("/")
    page.keyboard.type(f"id:{wanted}")
    kept = [query for query in range(3) if any(wanted in name for name in some.train_ids[query])]
    hidden = "[...document.querySelectorAll('#queries li')].map((item) => item.hidden)"
    assert page.evaluate(hidden) == [query not in kept for query in range(3)]
    assert page.inner_text(SHOWN) == f"query-{kept[0]}"
    bright = "[...document.querySelectorAll('.card:not(.dimmed)')].map((card) => card.ariaLabel)"
    assert all(wanted in name for name in page.evaluate(bright))
    page.keyboard.press("Escape")
    assert page.evaluate(hidden) == [False] * 3
    assert len(page.evaluate(bright)) == 12


def test_page_shows_hostile_captions_as_text(page):
    page.locator(".card").first.click()
    assert EVIL in page.text_content("#detail")
    assert page.locator("[onerror], img[src=x]").count() == 0
    assert page.title() == "Training examples behind each image"


def test_pictures_that_lie_beside_the_page_are_shown(browser, tmp_path):
    path = save_html(ranking(), query_image, train_image, tmp_path / "a b.html", embed=10)
    with opened(browser, path) as page:
        loaded = "[...document.querySelectorAll('main img')].filter((i) => i.naturalWidth === 8)"
        page.wait_for_function(f"{loaded}.length === 13")
