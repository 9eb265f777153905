"""`dmin serve` as people meet it: a browser, a real tiny model, two users, an end in the middle."""

import re
import shlex
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from browser import chromium
from command_line import Command, dmin
from PIL import Image

pytest.importorskip("gradio", reason="Gradio is not installed (pip install 'dmin[serve]')")

SMALL = ["extras.threads=1", "sketch.dim=256", "timesteps.num=2", "collect.limit=24", "-q"]


@pytest.fixture(scope="module")
def place(ddpm_path, tmp_path_factory):
    """A folder with a store, its model and a picture."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(ddpm_path, folder / "model")
    data = ["model=ddpm", "model.path=model", "data=digits"]
    dmin("collect", "store", *data, *SMALL, cwd=folder)
    pixels = np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1))
    Image.fromarray(pixels).save(folder / "a cat.png")
    (folder / "notes.png").write_text("no picture")
    return folder


@contextmanager
def served(place, *more):
    """The server and the address that it tells."""
    files = [place / "stdout", place / "stderr"]
    for file in files:
        file.write_text("")
    line = ["dmin", "serve", "store", "serve.port=0", "extras.threads=1", *more]
    command = Command("-m", *line, cwd=place, files=files)
    try:
        while not (found := re.search(r"Open (http\S+)", files[0].read_text())):
            assert command.poll() is None, files[1].read_text()[-3000:]
            time.sleep(0.1)
        yield command, found[1]
    finally:
        command.send_signal(signal.SIGTERM)
        assert command.wait(30).returncode == 0


@pytest.fixture(scope="module")
def server(place):
    with served(place) as (_, url):
        yield url


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@contextmanager
def visited(browser, url, width=1280, complains=False):
    """The page as one more user has it, which asks nobody but its own server for anything."""
    context = browser.new_context(viewport={"width": width, "height": 900}, reduced_motion="reduce")
    page, asked, complaints = context.new_page(), [], []
    page.set_default_timeout(20_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    page.wait_for_selector(".drop")
    yield page
    context.close()
    own = (url.partition("?")[0], "data:", "blob:")
    assert [each for each in asked if not each.startswith(own)] == []
    assert complains or complaints == []


def ask(page, prompt="3"):
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Ask", exact=True).click()


def answered(page):
    """The ids that an answer shows, best first."""
    frame = page.frame_locator("#answer iframe")
    frame.locator(".card").first.wait_for()
    return [each["id"] for each in frame.locator("body").evaluate("() => examples")]


def refused(page, words):
    page.wait_for_function(
        "(words) => document.querySelector('#answer [role=alert]')?.textContent.includes(words)",
        arg=words,
    )


def test_a_part_of_a_picture_is_asked_about_and_the_command_gives_the_same(browser, server, place):
    with visited(browser, server) as page:
        page.set_input_files("[type=file]", place / "a cat.png")
        page.get_by_text("Rectangle").click()
        ask(page)
        refused(page, "There is no rectangle")
        box = page.locator(".pad canvas").bounding_box()
        at = [(box["x"] + box["width"] * n, box["y"] + box["height"] * n) for n in (0.3, 0.7)]
        page.mouse.move(*at[0])
        page.mouse.down()
        page.mouse.move(*at[1], steps=3)
        page.mouse.up()
        assert page.locator(".numbers input").input_value() == "2, 2, 4, 4"
        ask(page)
        found, line = answered(page), page.inner_text(".again code")
        page.locator(".numbers input").fill("2, 2, 40, 4")
        ask(page)
        refused(page, "it is not inside a cat.png, which is 8 × 8 pixels")
        page.get_by_text("Brush").click()
        ask(page)
        refused(page, "Nothing is painted")
        page.mouse.move(*at[0])
        page.mouse.down()
        page.mouse.move(*at[1], steps=3)
        page.mouse.up()
        page.get_by_label("Where: maps of the first 3").check()
        ask(page)
        assert answered(page) and "--places=3" in page.inner_text(".again code")
        frame = page.frame_locator("#answer iframe")
        frame.locator(".card").nth(2).click()
        maps = frame.locator("dialog .places img")
        maps.nth(1).wait_for()
        assert maps.evaluate_all("all => all.map((each) => each.naturalWidth)") == [192, 192]
        assert "--mask=mask.png" in page.inner_text(".again code")
        with page.expect_download() as download:
            page.get_by_text("mask.png", exact=True).click()
        with Image.open(download.value.path()) as mask:
            assert mask.convert("L").getextrema() == (0, 255)
    dmin(*shlex.split(line)[1:], "-q", cwd=place)
    (file,) = place.glob("outputs/runs/retrieve/*/ranking.csv")
    rows = [row.split(",") for row in file.read_text().splitlines()]
    assert [row[rows[0].index("id")] for row in rows[1:]] == found


def test_bad_uploads_are_refused_in_words_and_the_page_goes_on(browser, server, place):
    with visited(browser, server, width=390) as page:  # as on a phone
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        ask(page)
        page.get_by_text("Drop a picture first").wait_for()
        page.set_input_files("[type=file]", place / "notes.png")
        page.get_by_text("This browser cannot show notes.png").wait_for()
        ask(page)
        refused(page, "notes.png cannot be read")
        page.get_by_role("button", name="Remove", exact=True).click()
        page.evaluate("document.querySelector('.pad').dataset.limit = '0.00001'")
        page.set_input_files("[type=file]", place / "a cat.png")
        page.get_by_text("of at most 0.00001").wait_for()
        page.evaluate("document.querySelector('.pad').dataset.limit = '32'")
        page.set_input_files("[type=file]", place / "a cat.png")
        ask(page)
        assert len(answered(page)) == 10
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_users_ask_at_once_and_each_has_his_answer(browser, server):
    with visited(browser, server) as one, visited(browser, server) as other:
        for page, prompt in ((one, "1"), (other, "2")):
            page.get_by_role("tab", name="Generate one").click()
            page.get_by_label("Steps").fill("2")
            ask(page, prompt)
        for page, prompt in ((one, "1"), (other, "2")):
            assert len(answered(page)) == 10
            assert f"--prompt={prompt} " in page.inner_text(".again code")


def test_the_map_shows_who_lies_near_whom(browser, server):
    with visited(browser, server) as page:
        page.get_by_role("tab", name="Map of the store").click()
        page.locator(".legend span").first.wait_for()
        names = page.locator(".map option").all_inner_texts()
        assert names == ["label", "loss", "self-influence ‖g‖²"]
        assert page.inner_text(".facts").startswith("24 training examples; two principal")
        canvas = page.locator(".map canvas")
        box = canvas.bounding_box()
        for x in range(30, int(box["width"]), 12):  # along a line until a point is met
            canvas.hover(position={"x": x, "y": box["height"] / 2})
            if page.locator(".tip").is_visible():
                break
        page.wait_for_function("document.querySelector('.tip img').naturalWidth === 8")
        id = page.inner_text(".tip span")
        canvas.click(position={"x": x, "y": box["height"] / 2})
        near = page.locator(".near li")
        near.nth(12).wait_for()
        assert near.count() == 13 and id in near.first.inner_text()
        cosines = [float(each) for each in page.locator(".near b").all_inner_texts()[1:]]
        assert cosines == sorted(cosines, reverse=True) and cosines[0] < 1
        second = near.nth(1).inner_text().split("\n")[1]
        near.nth(1).locator("button").click()
        page.wait_for_function(
            "(id) => document.querySelector('.near li').textContent.includes(id)", arg=second
        )
        page.locator(".map select").select_option("loss")
        assert "by rank" in page.inner_text(".legend")


def test_what_was_uploaded_is_deleted(server):
    assert not list(Path("/tmp").glob("dmin-serve-*/picture/a cat.png"))


def test_a_model_that_is_gone_and_a_server_that_is_stopped_are_told(browser, place):
    weights, away = place / "model/unet/config.json", place / "away.json"
    shutil.copy(weights, away)
    weights.unlink()
    methods = "method=dmin,grad_cos"
    with served(place, methods) as (command, url), visited(browser, url, complains=True) as page:
        page.get_by_text("grad_cos", exact=True).wait_for()  # as the command line says
        page.get_by_role("tab", name="Generate one").click()
        ask(page)
        refused(page, "cannot load a DDPMPipeline from it")
        shutil.copy(away, weights)  # and the page goes on
        page.get_by_label("Steps").fill("1000")
        ask(page)
        page.get_by_text("generating the picture").first.wait_for()
        command.send_signal(signal.SIGTERM)
        page.get_by_text("The server is away").wait_for()
    assert "Traceback" not in (place / "stderr").read_text()  # nor did it generate to the end
    assert (place / "outputs/runs/serve").is_dir()


def test_no_path_from_a_browser_is_opened_and_what_waits_is_bounded(server):
    httpx = pytest.importorskip("httpx")
    with httpx.Client(base_url=server, timeout=60) as client:
        config = client.get("config").json()

        def joined(session, pad, steps=2):
            asked = {"data": [pad, "3", ["dmin"], 5, False, 0, steps], "fn_index": 0}
            return client.post("gradio_api/queue/join", json={**asked, "session_hash": session})

        path = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        for session, pad in (("a", path), ("b", {"picture": path}), ("c", {"picture": str(path)})):
            assert joined(session, pad).status_code == 200
            said = client.get(f"gradio_api/queue/data?session_hash={session}").text
            assert "Drop a picture first" in said or "does not have the suffix of a picture" in said
        names = [each["id"] for each in config["components"] if each["type"] == "html"]
        asked = {"session_hash": "d", "component_id": names[-1], "fn_name": "map_of_store"}
        for data in (["picture", "/etc/passwd"], ["picture", -1], ["rows", 0], ["near", 1e9], None):
            told = client.post("gradio_api/component_server", json={**asked, "data": data})
            assert told.json() == {"told": "There is no such example on the map."}
        found = [joined(f"q{number}", None, 100).status_code for number in range(11)]
        assert found[:8] == [200] * 8 and found[-1] == 503
