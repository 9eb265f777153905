"""The gallery as its reader meets it: in a browser, at three widths, in light and dark."""

import io
from dataclasses import replace

import numpy as np
import pytest
from browser import broken_everywhere, chromium, opened
from PIL import Image
from rankings import (
    EVIL,
    TIMESTEPS,
    query_image,
    ranking,
    side_by_side,
    told,
    train_image,
    with_captions,
)

from dmin.attribution.ranking import format_score
from dmin.gallery.html import save_html
from dmin.gallery.pictures import PREVIEW, SHOWN as FRAMES, preview, to_picture
from dmin.runtime.errors import DminError

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
        sketch_errors=np.full_like(some.scores, 0.01),
        stability=np.full_like(some.scores, 0.97),
        groups=("first", "second"),
        group_contributions=some.scores[:, :, None] * [0.3, 0.7],
    )


@pytest.mark.parametrize("made", [ranking, crowded, unsplit, sure, told, side_by_side])
def test_pages_keep_the_laws_of_layout(browser, tmp_path, made):
    path = save_html(made(), query_image, train_image, tmp_path / "a.html")
    with opened(browser, path) as page:
        assert page.locator(".card").count() > 0
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
    assert page.locator(".card .score").first.inner_text() == format_score(some.scores[0, 0])
    assert page.locator("main img, nav img").count() == 2 + 12 + 3
    # All pictures have loaded, so their encoding is sound.
    widths = "[...document.querySelectorAll('main img')].map((one) => one.naturalWidth)"
    assert page.evaluate(widths) == [8] * 14
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
    for key in ("Tab", "Tab", "Tab", "Enter"):  # what is known of the query, two examples
        page.keyboard.press(key)
    assert page.inner_text(OPEN) == some.train_ids[1][1]
    page.keyboard.press("ArrowRight")
    assert page.inner_text(OPEN) == some.train_ids[1][2]
    rows = page.locator(".steps tbody tr").all_inner_texts()
    assert some.contributions is not None
    for row, timestep, part in zip(rows, TIMESTEPS, some.contributions[1, 2], strict=True):
        name, beyond, number = row.replace("−", "-").split()
        assert name == str(timestep)
        assert float(number) == pytest.approx(part, abs=1e-4)
        mean = some.contributions[1, :, TIMESTEPS.index(timestep)].mean()
        assert float(beyond) == pytest.approx(part - mean, abs=2e-4)
    page.keyboard.press("Escape")
    assert page.locator(OPEN).count() == 0
    # The browser gives the focus back to the card that opened it before the page moves it on.
    page.wait_for_selector(f'.card:focus[aria-label*="{some.train_ids[1][2]}"]')
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


def test_the_page_alone_answers_five_questions(browser, tmp_path):
    path = save_html(told(), query_image, train_image, tmp_path / "a.html")
    with opened(browser, path) as page:
        said = dict(
            zip(
                page.locator(".answers dt").all_inner_texts(),
                page.locator(".answers > div").all_inner_texts(),
                strict=True,
            )
        )
        which, sure, scale, second, decided = said.values()
        assert told().train_ids[0][0] in which
        assert "99 % sure to be among the first 12" in sure and "±4.0e-03" in sure
        assert "0.979 of 1" in scale and "above 99.94 % of 1,797" in scale and "0.620" in scale
        assert "Yes, they cannot be distinguished" in second and "1 to 4" in second
        assert "t = 550 made 93 %" in decided
        text = page.inner_text("body")
        for said in ("itself a training image", "t = 950): there all examples look alike"):
            assert said in text
        for said in ("EMA, 0.995", "outputs/stores/train-0123abcd", "2026-11-29"):
            assert said in page.inner_text("header")


def test_copies_share_a_card_and_ranks_stay_true(browser, tmp_path):
    some = told(1)
    path = save_html(some, query_image, train_image, tmp_path / "a.html")
    with opened(browser, path) as page:
        cards = page.locator(".card")
        assert cards.count() == 11
        assert "× 3" in cards.nth(1).inner_text() and "#4" in cards.nth(2).inner_text()
        cards.nth(1).click()
        detail = page.inner_text("#detail")
        assert some.train_ids[0][2] in detail and "digit-elsewhere" in detail


def test_captions_and_metadata_are_searched(browser, tmp_path):
    some = told(2)
    some.train_metadata[1][5] |= {"caption": "A red Fox", "artist": "Zoë Unlike"}
    wanted = some.train_ids[1][5]
    path = save_html(some, query_image, train_image, tmp_path / "a.html")
    with opened(browser, path) as page:
        for text in ("red fox", "zoë", "artist:unlike fox"):
            page.fill("#filter", text)
            assert page.inner_text(SHOWN) == "query-1"
            bright = page.locator(".card:not(.dimmed)")
            assert bright.count() == 1 and wanted in bright.get_attribute("aria-label")
        page.fill("#filter", "artist:fox")
        assert "No id, label, caption or metadata matches" in page.inner_text("main")


def test_rights_and_the_original_file_are_linked_and_nothing_else_is(browser, tmp_path):
    some = told(1)
    odd = {"licence": "javascript:alert(1)", "contact": "ann@example.org"}
    some.train_metadata[0][0] |= odd | {"url": "https://example.org/x'onclick=alert(1)"}
    some.train_metadata[0][1] |= {"file": "/elsewhere/a b#1.png"}
    below, names = tmp_path / "images" / "a %41 ?.png", some.train_ids[0]
    files = {names[0]: below, names[3]: tmp_path.parent / "beside.png"}
    path = save_html(some, query_image, train_image, tmp_path / "a.html", train_files=files.get)
    with opened(browser, path) as page:
        assert "Ann Other · CC BY 4.0" in page.locator(".card").nth(1).inner_text()
        links = "[...document.querySelectorAll('#detail a')].map((one) => one.getAttribute('href'))"
        page.locator(".card").first.click()
        source = "https://example.org/a"
        relative = "images/a%20%2541%20%3F.png"
        assert page.evaluate(links) == [source, "mailto:ann@example.org", relative]
        assert page.evaluate("document.querySelector('#detail a[href^=images]').href") == (
            below.as_uri()
        )
        assert "javascript:alert(1)" in page.inner_text("#detail")
        page.keyboard.press("ArrowRight")
        assert page.evaluate(links) == [source, "file:///elsewhere/a%20b%231.png"]
        page.keyboard.press("ArrowRight")
        assert page.evaluate(links) == [source, (tmp_path.parent / "beside.png").as_uri()]


def test_methods_stand_side_by_side_each_in_its_colour(browser, tmp_path):
    path = save_html(side_by_side(), query_image, train_image, tmp_path / "a.html")
    with opened(browser, path) as page:
        assert page.locator(".method > h3").all_inner_texts() == ["dmin", "blend", "pixel_l2"]
        tops = page.evaluate("[...document.querySelectorAll('.cards')].map((one) => one.offsetTop)")
        assert len(set(tops)) == 1
        seen = page.evaluate(
            """() => {
              const found = {};
              const colour = (node) => getComputedStyle(node).backgroundColor;
              const all = (root, selector) => [...root.querySelectorAll(selector)];
              const note = (name, one) => {
                found[name] = [...new Set([...found[name] ?? [], one])];
              };
              for (const section of document.querySelectorAll('.method')) {
                const name = section.querySelector('h3').textContent;
                note(name, colour(section.querySelector('h3 .dot')));
                for (const bar of all(section, '.scale i')) note(name, colour(bar));
                for (const bar of all(section, '.for')) note(name, getComputedStyle(bar).fill);
                for (const chip of all(section, '.chips [title*=" by "]'))
                  note(chip.title.split(' by ')[1], colour(chip.querySelector('.dot')));
              }
              return found;
            }"""
        )
        assert all(len(colours) == 1 for colours in seen.values()) and len(seen) == 3, seen
        assert len({colours[0] for colours in seen.values()}) == 3
        page.locator(".method").nth(1).locator(".card").nth(2).click()
        assert "by blend" in page.inner_text("#detail")
        page.keyboard.press("Escape")
        method = "document.activeElement.closest('.method').ariaLabel"
        assert page.evaluate(method) == "By blend"


def test_rankings_of_other_queries_are_not_put_side_by_side(tmp_path):
    with pytest.raises(DminError, match="same queries"):
        save_html([told(2), told(1, method="b")], query_image, train_image, tmp_path / "a.html")
    with pytest.raises(DminError, match="different method names"):
        save_html([told(1), told(1)], query_image, train_image, tmp_path / "a.html")


def test_pictures_that_lie_beside_the_page_are_shown(browser, tmp_path):
    path = save_html(ranking(), query_image, train_image, tmp_path / "a b.html", embed=10)
    with opened(browser, path) as page:
        loaded = "[...document.querySelectorAll('main img')].filter((i) => i.naturalWidth === 8)"
        page.wait_for_function(f"{loaded}.length === 14")


def clip_of(image):
    """A clip of nine frames that ends dark, whose middle frame is the image."""
    return lambda name: np.stack([image(name) * (9 - n) / 5 for n in range(9)], 1).clip(0, 1)


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_a_clip_moves_where_it_is_opened_unless_less_motion_is_wanted(browser, tmp_path, motion):
    clips = clip_of(query_image), clip_of(train_image)
    path = save_html(ranking(1, 2), *clips, tmp_path / "a.html")
    with opened(browser, path, reduced_motion=motion) as shown:
        assert "image/webp" not in shown.locator(".card img").first.evaluate("i => i.currentSrc")
        shown.locator(".card").first.click()
        said = shown.locator("#detail figure img").first.evaluate("i => i.currentSrc")
        assert ("image/webp" in said) == (motion != "reduce")
        assert "8 × 8 pixels, 9 frames" in shown.locator("#detail figcaption").first.inner_text()


def test_a_clip_is_shown_by_its_middle_frame_and_previews_are_bounded():
    name = "digit-3"
    assert to_picture(clip_of(train_image)(name), name) == to_picture(train_image(name), name)
    noise = np.random.default_rng(0).random((3, 40, 300, 400), np.float32)
    content = preview(noise, "noise")
    with Image.open(io.BytesIO(content)) as moving:
        moving.load()
        assert len(content) <= PREVIEW and moving.n_frames == FRAMES and max(moving.size) <= 192
        assert abs(moving.n_frames * moving.info["duration"] - 40_000 / 16) <= FRAMES
    still = preview(clip_of(train_image)(name), name)
    with Image.open(io.BytesIO(still)) as moving:
        moving.seek(4)
        assert moving.convert("L").tobytes() == to_picture(train_image(name), name).tobytes()


def test_many_clips_stand_in_files_of_their_own(tmp_path):
    clips = clip_of(query_image), clip_of(train_image)
    path = save_html(ranking(1, 2), *clips, tmp_path / "a.html", embed=14)
    kinds = sorted(f.suffix for f in (tmp_path / "a_files").iterdir())
    assert kinds == [".png"] * 3 + [".webp"] * 3 and path.stat().st_size < 1 << 20
    save_html(ranking(1, 2), *clips, tmp_path / "b.html", embed=15)
    assert not (tmp_path / "b_files").exists()
