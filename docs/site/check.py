"""Hold a built site to its word: every link leads somewhere, and no page asks another server."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """The links, anchors and loaded files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag refers to."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given.get("id", ""), given.get("name", "")}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        inert = tag == "link" and given.get("rel") in ("canonical", "prev", "next", "alternate")
        if tag in LOADED and given.get(LOADED[tag]) and not inert:
            self.loaded.add(given[LOADED[tag]])


def faults(site: Path) -> list[str]:
    """Return the links that lead nowhere, and what is loaded from elsewhere."""
    pages = {file.resolve(): Page(file.read_text()) for file in sorted(site.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        where = file.relative_to(site.resolve())
        found += [f"{where}: loads {each}" for each in sorted(page.loaded) if _elsewhere(each)]
        for link in sorted(page.links | page.loaded):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or where.name == "404.html":
                continue
            to = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            to = to / "index.html" if to.is_dir() else to
            anchor = unquote(parts.fragment)
            if not to.exists():
                found.append(f"{where}: no {link}")
            elif anchor and to in pages and anchor not in pages[to].anchors:
                found.append(f"{where}: no such part, {link}")
    return found


def _elsewhere(link: str) -> bool:
    return urlsplit(link).scheme in ("http", "https") or link.startswith("//")


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    print("\n".join(wrong) or "every link leads somewhere; no page asks another server")
    sys.exit(bool(wrong))
