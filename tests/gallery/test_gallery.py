import fcntl
import html
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from dmin.attribution.ranking import Ranking, format_score
from dmin.gallery.html import save_html
from dmin.gallery.pictures import data_uri, fit, to_picture
from dmin.gallery.png import ACCENT, AGAINST, AGREES, save_png
from dmin.runtime.errors import DminError

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = (IMAGES / 16).reshape(-1, 1, 8, 8)
TIMESTEPS = (950, 750, 550, 350, 150)
EVIL = "</script><img src=x onerror=document.title='owned'>{{DATA}}<!--\u2028"


def query_image(name: str) -> np.ndarray:
    return IMAGES[1000 + int(name.split("-")[1])]


def train_image(name: str) -> np.ndarray:
    return IMAGES[int(name.split("-")[1])]


def ranking(queries: int = 3, k: int = 12) -> Ranking:
    """Rank digits by the cosine of their pixels, split over the timesteps with one negative."""
    rows, scores = [], []
    unit = IMAGES.reshape(len(IMAGES), -1)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    for query in range(1000, 1000 + queries):
        similar = unit[:1000] @ unit[query]
        rows.append(np.argsort(-similar)[:k])
        scores.append(similar[rows[-1]])
    contributions = np.array(scores)[:, :, None] * [-0.1, 0.1, 0.3, 0.5, 0.2]
    return Ranking(
        method="dmin",
        timesteps=TIMESTEPS,
        query_ids=[f"query-{query}" for query in range(queries)],
        query_metadata=[{"label": int(LABELS[1000 + i]), "seed": i} for i in range(queries)],
        train_rows=np.array(rows),
        train_ids=[[f"digit-{row}" for row in line] for line in rows],
        train_metadata=[
            [{"label": int(LABELS[row]), "file": f"{row}.png"} for row in line] for line in rows
        ],
        scores=np.array(scores),
        contributions=contributions,
    )


def with_captions(plain: Ranking, caption: str) -> Ranking:
    metadata = [[{**one, "caption": caption} for one in row] for row in plain.train_metadata]
    return replace(plain, train_metadata=metadata)


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
        assert [data["examples"][i]["id"] for i in entry["top"]] == shared.train_ids[query]
    for entry in data["examples"]:
        assert entry["image"] == data_uri(to_picture(train_image(entry["id"]), ""))


def test_html_holds_scores_and_contributions(tmp_path):
    some = ranking()
    data = page_data(save_html(some, query_image, train_image, tmp_path / "a.html"))
    assert some.contributions is not None
    for query, entry in enumerate(data["queries"]):
        np.testing.assert_allclose(entry["parts"], some.contributions[query], rtol=1e-3)
        assert entry["scores"] == [format_score(score) for score in some.scores[query]]
        assert entry["same"] == [some.same_label(query, rank) for rank in range(12)]


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
    assert data["examples"][0]["meta"]["caption"] == EVIL
    assert data["method"] == data["title"] == data["notes"][EVIL] == EVIL
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


# The page in a browser


class Browser:
    """Headless Chromium, spoken to over two pipes in its DevTools protocol."""

    def __init__(self, page: Path, profile: Path) -> None:
        # Chromium reads from file descriptor 3 and writes to 4; keep ours away from these.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (*os.pipe(), *os.pipe())]
        its_input, self.output, answers, its_output = ends
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update"]
        flags += ["--disable-sync", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        redirect = f'exec "$@" 3<&{its_input} 4>&{its_output}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirect, "browser", CHROMIUM, *flags, "about:blank"],
            pass_fds=(its_input, its_output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_input)
        os.close(its_output)
        self.answers = os.fdopen(answers, "rb")
        self.count, self.session = 0, ""
        self.complaints: list[Any] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.send(f"{domain}.enable")
        self.send("Page.navigate", url=page.as_uri())
        while self.read().get("method") != "Page.loadEventFired":
            pass

    def read(self) -> dict[str, Any]:
        text = bytearray()
        while (character := self.answers.read(1)) != b"\0":
            assert character, "Chromium has gone"
            text += character
        message = json.loads(text)
        if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
            self.complaints.append(message["params"])
        return message

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.output, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.count:
            pass
        return answer["result"]

    def press(self, key: str, code: int = 0) -> None:
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        event = {"key": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def ask(self, expression: str) -> Any:
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, condition: str, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not self.ask(condition):
            assert time.monotonic() < end, f"still not true: {condition}"

    def close(self) -> None:
        self.send("Browser.close")
        self.process.wait(30)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
SHOWN = "document.querySelector('main h2').textContent"
OPEN = "document.querySelector('#detail[open] h2')?.textContent"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    some = with_captions(ranking(), EVIL)
    path = save_html(some, query_image, train_image, tmp_path / "a.html", notes={"note": "noted"})
    started = Browser(path, tmp_path / "profile")
    yield started
    started.close()


def test_page_shows_a_query_with_its_examples(browser):
    some = ranking()
    assert browser.ask(SHOWN) == "query-0"
    assert browser.ask("document.querySelectorAll('.card').length") == 12
    assert browser.ask("document.querySelectorAll('.card svg rect').length") == 12 * 5
    assert browser.ask("document.querySelectorAll('.card svg .against').length") == 12
    assert browser.ask("document.querySelector('.card .score').textContent") == format_score(
        some.scores[0, 0]
    )
    assert browser.ask("document.querySelectorAll('main img, nav img').length") == 1 + 12 + 3
    # All pictures have loaded, so their encoding is sound.
    widths = "[...document.querySelectorAll('main img')].map((one) => one.naturalWidth)"
    assert browser.ask(widths) == [8] * 13
    assert "noted" in browser.ask("document.querySelector('header').textContent")
    assert browser.complaints == []


def test_page_is_walked_with_keys(browser):
    some = ranking()
    for key, code, shown in [
        ("j", 74, "query-1"),
        ("ArrowRight", 39, "query-2"),
        ("j", 74, "query-2"),
        ("k", 75, "query-1"),
        ("ArrowUp", 38, "query-0"),
        ("ArrowDown", 40, "query-1"),
    ]:
        browser.press(key, code)
        assert browser.ask(SHOWN) == shown
    browser.press("Tab", 9)
    browser.press("Tab", 9)
    browser.press("Enter", 13)
    assert browser.ask(OPEN) == some.train_ids[1][1]
    browser.press("ArrowRight", 39)
    assert browser.ask(OPEN) == some.train_ids[1][2]
    rows = browser.ask("[...document.querySelectorAll('.steps tbody tr')].map((r) => r.innerText)")
    assert some.contributions is not None
    for row, timestep, part in zip(rows, TIMESTEPS, some.contributions[1, 2], strict=True):
        name, number = row.split()
        assert name == str(timestep)
        assert float(number.replace("−", "-")) == pytest.approx(part, abs=1e-4)
    browser.press("Escape", 27)
    assert browser.ask(OPEN) is None
    browser.until(f"document.activeElement.ariaLabel?.includes('{some.train_ids[1][2]}')")
    browser.press("?", 191)
    assert browser.ask("document.querySelector('#help').open") is True
    assert browser.complaints == []


def test_page_filters_by_id_and_label(browser):
    some = ranking()
    wanted = some.train_ids[1][4]
    browser.press("/", 191)
    for letter in f"id:{wanted}":
        browser.press(letter)
    kept = [query for query in range(3) if any(wanted in name for name in some.train_ids[query])]
    hidden = "[...document.querySelectorAll('#queries li')].map((item) => item.hidden)"
    assert browser.ask(hidden) == [query not in kept for query in range(3)]
    assert browser.ask(SHOWN) == f"query-{kept[0]}"
    bright = "[...document.querySelectorAll('.card:not(.dimmed)')].map((card) => card.ariaLabel)"
    assert all(wanted in name for name in browser.ask(bright))
    browser.press("Escape", 27)
    assert browser.ask(hidden) == [False] * 3
    assert len(browser.ask(bright)) == 12


def test_page_shows_hostile_captions_as_text(browser):
    browser.ask("document.querySelector('.card').click()")
    assert EVIL in browser.ask("document.querySelector('#detail').textContent")
    assert browser.ask("document.querySelectorAll('[onerror], img[src=x]').length") == 0
    assert browser.ask("document.title") == "Training examples behind each image"


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


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
def test_a_browser_shows_pictures_that_lie_beside_the_page(tmp_path):
    path = save_html(ranking(), query_image, train_image, tmp_path / "a b.html", embed=10)
    browser = Browser(path, tmp_path / "profile")
    try:
        widths = "[...document.querySelectorAll('main img')].map((one) => one.naturalWidth)"
        browser.until(f"{widths}.every((width) => width === 8)")
        assert len(browser.ask(widths)) == 13 and browser.complaints == []
    finally:
        browser.close()


def test_opponents_are_called_so(tmp_path):
    some = ranking()
    turned = replace(
        some, scores=-some.scores, contributions=-some.contributions, order="opponents"
    )
    path = save_html(turned, query_image, train_image, tmp_path / "a.html")
    assert page_data(path)["title"] == "Training examples that speak against each image"
