"""A page in headless Chromium, and the laws of layout that every page of dmin keeps."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
WIDTHS = (390, 820, 1440)
SCHEMES = ("light", "dark")
LAWS = (Path(__file__).parent / "layout_laws.js").read_text()


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Any,
    path: Path,
    width: int = 1440,
    scheme: str = "light",
    reduced_motion: str = "reduce",
) -> Iterator[Any]:
    """A page that asks for nothing but itself and what lies beside it, and complains of nothing."""
    view = {"width": width, "height": 900}
    context = browser.new_context(viewport=view, color_scheme=scheme, reduced_motion=reduced_motion)
    page, asked, complaints = context.new_page(), [], []
    page.set_default_timeout(10_000)
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        page.goto(path.as_uri())
        yield page
    finally:
        context.close()
        beside = path.parent.as_uri() + "/"
        away = [url for url in asked if not url.startswith(("data:", beside))]
        assert not away, f"asks for what is elsewhere: {away}"
        assert not complaints, complaints


def broken_laws(page: Any) -> list[str]:
    """What on the page, as it is shown now, breaks a law of layout: see `layout_laws.js`."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    return page.evaluate(LAWS)


def broken_everywhere(page: Any) -> list[str]:
    """The same for every width, in light and in dark."""
    found = []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            found += [f"{width} px, {scheme}: {law}" for law in broken_laws(page)]
    return found
