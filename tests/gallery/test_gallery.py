import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rankings import EVIL, IMAGES, query_image, ranking, train_image, with_captions

from dmin.attribution.place_maps import Places
from dmin.attribution.ranking import format_score
from dmin.gallery.html import save_html
from dmin.gallery.pictures import data_uri, fit, overlaid, to_picture
from dmin.gallery.png import ACCENT, AGAINST, AGREES, save_png
from dmin.runtime.errors import DminError


def page_data(path: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S
    )
    assert found is not None
    return json.loads(found[1])


# Pictures


def test_a_picture_keeps_every_pixel_of_a_tiny_image():
    picture = to_picture(IMAGES[0], "digit-0")
    assert picture.mode == "L" and picture.size == (8, 8)
    np.testing.assert_array_equal(np.asarray(picture), np.round(IMAGES[0, 0] * 255))
    enlarged = np.asarray(fit(picture, 80))
    np.testing.assert_array_equal(enlarged, np.asarray(picture).repeat(10, 0).repeat(10, 1))


def test_a_picture_keeps_channels_and_proportions():
    array = np.zeros((3, 30, 60))
    array[0] = 1
    picture = to_picture(array, "red")
    assert picture.size == (60, 30) and picture.getpixel((5, 5)) == (255, 0, 0)
    assert fit(picture, 20).size == (20, 10)


@pytest.mark.parametrize(
    "array, named",
    [
        (np.zeros((8, 8)), "shape"),
        (np.zeros((4, 8, 8)), "shape"),
        (np.full((1, 8, 8), -1.0), r"\(image \+ 1\) / 2"),
        (np.full((1, 8, 8), np.nan), "nan"),
    ],
)
def test_an_image_that_cannot_be_shown_is_refused_by_name(array, named):
    with pytest.raises(DminError, match=named) as error:
        to_picture(array, "the-image")
    assert "the-image" in str(error.value)


def test_large_images_are_scaled_down_to_be_embedded():
    noise = to_picture(np.random.default_rng(0).random((3, 400, 800)), "noise")
    address = data_uri(noise)
    assert address.startswith("data:image/jpeg;base64,")
    flat = to_picture(np.zeros((3, 400, 800)), "flat")
    assert data_uri(flat).startswith("data:image/png;base64,")
    assert len(data_uri(noise, limit=128)) < len(address) / 2


# PNG


def test_png_has_the_size_and_the_pictures_it_should(tmp_path):
    path = save_png(ranking(), query_image, train_image, tmp_path / "new" / "gallery.png")
    page = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert 1700 <= page.shape[1] <= 1800
    assert path == tmp_path / "new" / "gallery.png"
    one = Image.open(save_png(ranking(1), query_image, train_image, tmp_path / "one.png"))
    three_rows, one_row = page.shape[0], one.size[1]
    assert (three_rows - one_row) % 2 == 0 and three_rows - one_row > 2 * 150
    # The digits are black with white strokes, and no other thing on the page is black.
    black = (page.max(axis=2) < 4).sum()
    assert black > 3 * 13 * 1000


def test_png_places_the_right_picture_at_each_rank(tmp_path):
    """Give every example one grey of its own and find the greys again, in order of rank."""
    some = ranking(queries=1, k=4)
    greys = {name: 0.2 + 0.15 * rank for rank, name in enumerate(some.train_ids[0])}
    path = save_png(
        some,
        lambda name: np.zeros((1, 8, 8)),
        lambda name: np.full((1, 8, 8), greys[name]),
        tmp_path / "greys.png",
    )
    page = np.asarray(Image.open(path).convert("L"))
    line = page[page.shape[0] // 2 - 40]
    centres = [np.flatnonzero(line == round(grey * 255)).mean() for grey in greys.values()]
    assert centres == sorted(centres) and np.diff(centres).min() > 100


def pixels_of(path: Path, colour: str) -> np.ndarray:
    """Find the pixels of one colour: [height, width] of bool."""
    page = np.asarray(Image.open(path).convert("RGB"))
    return (page == list(bytes.fromhex(colour[1:]))).all(axis=2)


def test_png_draws_what_each_timestep_contributed(tmp_path):
    some = ranking(queries=1)
    path = save_png(some, query_image, train_image, tmp_path / "bars.png")
    against, towards = (pixels_of(path, colour)[:, -300:] for colour in (AGAINST, ACCENT))
    # One negative of .1 against positives of .1, .3, .5, .2; the edges of bars are blended.
    assert towards.sum() / against.sum() == pytest.approx(11, rel=0.3)
    (lower, left), (upper, right) = np.nonzero(against), np.nonzero(towards)
    assert upper.max() <= lower.min() and left.max() < right.min()
    bare = replace(some, contributions=None)
    bare_path = save_png(bare, query_image, train_image, tmp_path / "bare.png")
    assert pixels_of(bare_path, AGAINST).sum() == 0


def test_png_marks_the_labels_that_agree(tmp_path):
    some = ranking()
    path = save_png(some, query_image, train_image, tmp_path / "some.png")
    assert pixels_of(path, AGREES).sum() > 100
    other = replace(some, query_metadata=[{"label": "none"}] * 3)
    assert pixels_of(save_png(other, query_image, train_image, path), AGREES).sum() == 0


def test_png_takes_ids_for_names_and_not_for_formulas(tmp_path):
    hostile = replace(ranking(), query_ids=[r"$\frac$-0", r"$\nothing$-1", "$-2"])
    assert save_png(hostile, query_image, train_image, tmp_path / "a.png").is_file()


def test_png_limits_columns_and_rows(tmp_path):
    asked: list[str] = []

    def train(name: str) -> np.ndarray:
        asked.append(name)
        return train_image(name)

    some = ranking()
    save_png(some, query_image, train, tmp_path / "a.png", columns=4, max_queries=2)
    assert asked == some.train_ids[0][:4] + some.train_ids[1][:4]


def test_png_is_the_same_each_time(tmp_path):
    pages = [save_png(ranking(), query_image, train_image, tmp_path / f"{i}.png") for i in (0, 1)]
    assert pages[0].read_bytes() == pages[1].read_bytes()


# HTML


def test_html_holds_each_image_once(tmp_path):
    some = ranking()
    shared = replace(some, train_ids=[some.train_ids[0]] * 3)
    asked: list[str] = []

    def train(name: str) -> np.ndarray:
        asked.append(name)
        return train_image(name)

    path = save_html(shared, query_image, train, tmp_path / "new" / "gallery.html")
    assert asked == shared.train_ids[0]
    assert path.read_text("utf-8").count("data:image/") == 3 + 12
    data = page_data(path)
    for query, entry in enumerate(data["queries"]):
        assert entry["image"] == data_uri(to_picture(query_image(entry["id"]), ""))
        cards = entry["answers"][0]["cards"]
        found = [data["examples"][card["example"]]["id"] for card in cards]
        assert found == shared.train_ids[query]
    for entry in data["examples"]:
        assert entry["image"] == data_uri(to_picture(train_image(entry["id"]), ""))


def test_html_holds_scores_and_contributions(tmp_path):
    some = ranking()
    data = page_data(save_html(some, query_image, train_image, tmp_path / "a.html"))
    assert some.contributions is not None
    for query, entry in enumerate(data["queries"]):
        cards = entry["answers"][0]["cards"]
        parts = [card["parts"] for card in cards]
        np.testing.assert_allclose(parts, some.contributions[query], rtol=1e-3)
        assert [card["score"] for card in cards] == list(map(format_score, some.scores[query]))
        assert [card["same"] for card in cards] == [some.same_label(query, r) for r in range(12)]


def test_html_reaches_for_nothing_outside_itself(tmp_path):
    path = save_html(ranking(), query_image, train_image, tmp_path / "a.html")
    text = path.read_text("utf-8")
    assert re.findall(r"https?://[^\"'\s]*", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"\b(src|href)=\"|url\(|@import|fetch\(|\{\{", text)
    assert "default-src 'none'" in text


def test_html_escapes_every_string(tmp_path):
    evil = with_captions(ranking(queries=1, k=3), EVIL)
    evil = replace(evil, query_metadata=[{"label": EVIL}], method=EVIL)
    path = save_html(
        evil, query_image, train_image, tmp_path / "a.html", title=EVIL, notes={EVIL: EVIL}
    )
    text = path.read_text("utf-8")
    assert EVIL not in text and "<img" not in text
    assert text.count("</script>") == 2 and text.count("<script") == 2
    data = page_data(path)
    assert data["examples"][0]["caption"] == EVIL
    assert data["methods"][0]["name"] == data["title"] == data["about"][EVIL] == EVIL
    assert f"<title>{html.escape(EVIL)}</title>" in text


def test_examples_below_the_bound_are_not_shown(tmp_path):
    whole = ranking(queries=2, k=4)
    bound = float(whole.scores[0, 1])
    some = replace(whole, min_score=bound)
    kept = [some.count(query) for query in range(2)]
    assert kept[0] == 2 and sum(kept) < 8
    asked: list[str] = []

    def asked_image(name):
        asked.append(name)
        return train_image(name)

    save_png(some, query_image, asked_image, tmp_path / "a.png")
    assert asked == [name for q in range(2) for name in whole.train_ids[q][: kept[q]]]
    asked.clear()
    save_html(some, query_image, asked_image, tmp_path / "a.html")
    assert set(asked) == {name for q in range(2) for name in whole.train_ids[q][: kept[q]]}


def test_html_of_many_digits_stays_below_a_megabyte(tmp_path):
    path = save_html(ranking(24, 50), query_image, train_image, tmp_path / "a.html")
    assert path.stat().st_size < 1_000_000


def test_pictures_of_a_large_page_are_files_beside_it(tmp_path):
    path = tmp_path / "a b.html"
    (tmp_path / "a b_files").mkdir()
    (tmp_path / "a b_files" / "000099.png").write_bytes(b"of an earlier page")
    save_html(ranking(), query_image, train_image, path, embed=10)
    names = sorted(file.name for file in (tmp_path / "a b_files").iterdir())
    data = page_data(path)
    addresses = [entry["image"] for entry in data["queries"] + data["examples"]]
    assert sorted(addresses) == [f"a%20b_files/{name}" for name in names]
    assert "data:image" not in path.read_text("utf-8")
    for entry in data["examples"]:
        shown = Image.open(tmp_path / "a b_files" / entry["image"].split("/")[1])
        expected = to_picture(train_image(entry["id"]), "")
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected))


def test_opponents_are_called_so(tmp_path):
    some = ranking()
    turned = replace(
        some, scores=-some.scores, contributions=-some.contributions, order="opponents"
    )
    path = save_html(turned, query_image, train_image, tmp_path / "a.html")
    assert page_data(path)["title"] == "Training examples that speak against each image"


def test_where_scores_come_from_is_shown_on_page_and_picture(tmp_path):
    shown = ranking(queries=1, k=3)
    up = np.zeros((8, 8), np.float32)
    up[:4] = 1 / 32
    maps = {("dmin", "query-0", id): Places(up, up.T.copy(), 1.25) for id in shown.train_ids[0][:2]}
    save_html(shown, query_image, train_image, tmp_path / "a.html", places=maps)
    answer = page_data(tmp_path / "a.html")["queries"][0]["answers"][0]
    assert list(answer["places"]) == ["0", "1"]
    assert answer["places"]["0"]["said"] == "sum 1.000"
    save_png(shown, query_image, train_image, tmp_path / "a.png", places=maps)
    save_png(shown, query_image, train_image, tmp_path / "b.png")
    heights = [Image.open(tmp_path / name).height for name in ("a.png", "b.png")]
    assert heights[0] > heights[1] + 150
    pixels = np.asarray(overlaid(to_picture(train_image("digit-0"), ""), up), float)
    blue = pixels[..., 2] - pixels[..., 0]
    assert blue[:60].mean() > 50 and abs(blue[-40:]).max() < 8
