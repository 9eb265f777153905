"""The gallery as an HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from dmin.attribution.place_maps import PlacesOf
from dmin.attribution.ranking import Ranking, format_score, headline
from dmin.attribution.wording import (
    spell_blind,
    spell_confidence,
    spell_copies,
    spell_percentile,
    spell_same_as,
    spell_scale,
    spell_size,
)
from dmin.gallery.answers import answers
from dmin.gallery.columns import address, is_rights, original, text
from dmin.gallery.pictures import (
    PREVIEW,
    TINY,
    Images,
    address_of,
    encoded,
    overlaid,
    preview,
    to_picture,
)
from dmin.runtime.colours import method_colours
from dmin.runtime.errors import DminError
from dmin.runtime.page import write_page

EMBED = 2000  # pictures of 10 to 40 kB; with more, a page opens slowly
Files = Callable[[str], str | Path | None]
"""From an id to the example's original file, if it has one."""


def save_html(
    ranking: Ranking | Sequence[Ranking],
    query_images: Images,
    train_images: Images,
    path: str | Path,
    *,
    title: str | None = None,
    notes: dict[str, str] | None = None,
    embed: int = EMBED,
    query_files: Files | None = None,
    train_files: Files | None = None,
    places: PlacesOf | None = None,
) -> Path:
    """Write a page that shows every query with the training examples behind it.

    Args:
        ranking: shown with all queries and ranks; several rankings of the same queries, by
            methods of different names, are shown side by side.
        query_images: id of a query -> [C, H, W] in [0, 1], C of 1 or 3; or a clip [C, F, H, W],
            shown by its middle frame, and animated where it is opened.
        train_images: the same for training examples; called once per id.
        path: the HTML file to write; its folder is created if it does not exist.
        title: headline; None: a description of what the page shows.
        notes: more entries for the header, such as `{"machine": "of the lab"}`.
        embed: most pictures embedded in the page. With more, all are files in the folder
            `<name of the page>_files` beside it, and the browser loads those that it shows. Keep
            page and folder together.
        query_files: id of a query -> its original file, which the page links; or None.
        train_files: the same for training examples.
        places: attribution maps (`dmin.places`), shown where an example is opened.

    Returns:
        The path. Each image is stored once, at most 256 pixels a side: smaller ones unchanged,
        larger ones scaled down (as PNG or JPEG, whichever is smaller).

    Raises:
        DminError: an image has another shape or range, or rankings are not of the same queries.
    """
    rankings = [ranking] if isinstance(ranking, Ranking) else list(ranking)
    _check_alike(rankings)
    title, path = title or headline(rankings[0]), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = {id for each in rankings for row in each.train_ids for id in row}
    moving = any(query_images(id).ndim == 4 for id in rankings[0].query_ids[:1])
    each = 1 + PREVIEW // (20 << 10) * moving  # a preview is as large as some pictures
    beside = each * (len(rankings[0].query_ids) + len(ids)) > embed
    store = _Folder(path.with_name(f"{path.stem}_files")) if beside else address_of
    shown = _Entries(query_images, query_files or _nowhere, path, store)
    examples = _Entries(train_images, train_files or _nowhere, path, store)
    names = [each.method for each in rankings]
    all_shares = [each.order_shares for each in rankings]  # of all queries at once
    queries = [
        {
            **shown.entry(name, rankings[0].query_metadata[query]),
            "answers": [
                _answer(each, query, examples, None if shares is None else shares[query])
                | _places(each, query, shown, examples, places or {})
                for each, shares in zip(rankings, all_shares, strict=True)
            ],
            "sameAs": next(filter(None, (spell_same_as(each, query) for each in rankings)), None),
        }
        for query, name in enumerate(rankings[0].query_ids)
    ]
    data = {
        "title": title,
        "about": {**rankings[0].about, **(notes or {})},
        "colours": method_colours(dict.fromkeys(names, "")) if len(names) > 1 else {},
        "methods": [_method(each) for each in rankings],
        "queries": queries,
        "examples": list(examples.entries.values()),
    }
    return write_page(Path(__file__).with_name("gallery"), title, data, path)


def _check_alike(rankings: Sequence[Ranking]) -> None:
    names = [each.method for each in rankings]
    same = all(each.query_ids == rankings[0].query_ids for each in rankings)
    if not rankings or len(set(names)) < len(names) or not same:
        raise DminError(
            f"A page cannot show the rankings {names} side by side: they must have "
            f"the same queries and different method names. Save the others as separate pages."
        )


def _nowhere(id: str) -> None:
    """Return None: examples without known files."""


def _method(ranking: Ranking) -> dict[str, Any]:
    blind = set(ranking.blind or ())
    return {
        "name": ranking.method,
        "timesteps": [f"{t:g}" for t in ranking.timesteps],
        "blind": [t in blind for t in ranking.timesteps],
        "blindText": spell_blind(ranking),
        "groups": list(ranking.groups),
        "notes": {str(topic): str(note) for topic, note in ranking.notes.items()},
        "k": ranking.scores.shape[1],
    }


def _answer(
    ranking: Ranking, query: int, examples: _Entries, shares: np.ndarray | None
) -> dict[str, Any]:
    """Return one method's answer to one query: the five answers, and a card for each picture."""
    shares = shares if shares is not None and np.isfinite(shares).all() else None
    shown = ranking.count(query)
    parts = {"parts": ranking.contributions, "groupParts": ranking.group_contributions}
    means = {
        name: None if part is None or not shown else _short(part[query, :shown].mean(0))
        for name, part in parts.items()
    }
    return {
        "said": answers(ranking, query, shares),
        "cards": [_card(ranking, query, rank, examples) for rank in ranking.cards(query)],
        "shares": None if shares is None else _short(shares),
        "means": means["parts"],
        "groupMeans": means["groupParts"],
        "typical": _share(ranking, query, ranking.typical),
        "shown": shown,
    }


def _places(
    ranking: Ranking, query: int, shown: _Entries, examples: _Entries, places: PlacesOf
) -> dict[str, Any]:
    """Return the attribution maps as pictures, by index of the card; empty if there are none."""
    asked, found = ranking.query_ids[query], {}
    for card, rank in enumerate(ranking.cards(query)):
        name = ranking.train_ids[query][rank]
        maps = places.get((ranking.method, asked, name))
        if maps is None:
            continue
        found[card] = {"train": examples.overlaid(name, maps.train), "said": maps.spell()}
        if maps.query is not None:
            found[card]["query"] = shown.overlaid(asked, maps.query)
    return {"places": found} if found else {}


def _card(ranking: Ranking, query: int, rank: int, examples: _Entries) -> dict[str, Any]:
    name = ranking.train_ids[query][rank]
    size = spell_size(ranking, query, rank)
    more = {} if size is None else {"best of its group": f"{size} examples"}
    copies = ranking.copies(query, rank)
    pooled = "pool" in ranking.query_metadata[query]  # several pictures: no card equals the query
    same_as = [] if pooled else (ranking.same_as or [[]] * (query + 1))[query]
    card = {
        "example": examples.place(name, ranking, query, rank, more),
        "rank": rank + 1,
        "score": format_score(ranking.scores[query, rank]),
        "same": ranking.same_label(query, rank),
    }
    known = {
        "scale": spell_scale(ranking, query, rank),
        "share": _share(ranking, query, ranking.scores[:, rank]),
        "percentile": spell_percentile(ranking, query, rank),
        "sure": spell_confidence(ranking, query, rank),
        "alike": _alike(ranking, query, rank),
        "copies": spell_copies(ranking, query, rank),
        "copyIds": copies or None,
        "itself": not {name, *copies}.isdisjoint(same_as) or None,
    }
    card |= {key: value for key, value in known.items() if value is not None}
    if ranking.contributions is not None:
        card["parts"] = _short(ranking.contributions[query, rank])
    if ranking.group_contributions is not None:
        card["groupParts"] = _short(ranking.group_contributions[query, rank])
    return card


def _alike(ranking: Ranking, query: int, rank: int) -> str | None:
    """Return the ranks that cannot be distinguished from this one, as ``1–4``, or None."""
    if ranking.tiers is None:
        return None
    tiers = ranking.tiers[query, : ranking.count(query)]  # ascending
    first = int(np.searchsorted(tiers, tiers[rank])) + 1
    last = int(np.searchsorted(tiers, tiers[rank], "right"))
    return f"{first}–{last}" if first < last else None


def _share(ranking: Ranking, query: int, values: np.ndarray | None) -> float | None:
    """Return a value divided by the largest possible score, in [0, 1]; None if unbounded."""
    if values is None or ranking.maximum is None or not ranking.maximum[query]:
        return None
    share = float(values[query]) / float(ranking.maximum[query])
    return round(min(1.0, max(0.0, share)), 4)


def _short(values: np.ndarray) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


class _Entries:
    """Pictures and metadata of queries or of examples, each stored once in the page."""

    def __init__(
        self, images: Images, files: Files, page: Path, store: Callable[[str, bytes], str]
    ) -> None:
        self.images, self.files, self.page, self.store = images, files, page, store
        self.entries: dict[str, dict[str, Any]] = {}
        self.places: dict[str, int] = {}

    def place(
        self, name: str, ranking: Ranking, query: int, rank: int, more: dict[str, str]
    ) -> int:
        """Return the index of a training example among the entries; a new one is added."""
        if name not in self.places:
            self.places[name] = len(self.places)
            entry = self.entry(name, ranking.train_metadata[query][rank])
            entry["row"] = int(ranking.train_rows[query, rank])
            entry["label"] = ranking.label(query, rank)
            entry["meta"] |= more
            self.entries[name] = entry
        return self.places[name]

    def overlaid(self, name: str, places: np.ndarray) -> str:
        """Return the address of a picture with its attribution map laid over it."""
        return self.store(*encoded(overlaid(to_picture(self.images(name), name), places)))

    def entry(self, name: str, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the page's data of one picture."""
        array = self.images(name)
        picture, clip = to_picture(array, name), array.ndim == 4
        moving = self.store("webp", preview(array, name)) if clip else None
        columns = {str(key): text(value) for key, value in metadata.items()}
        caption = columns.pop("caption", None)
        return {
            "id": name,
            "label": None if metadata.get("label") is None else str(metadata["label"]),
            "caption": caption,
            "meta": {k: v for k, v in columns.items() if not is_rights(k)},
            "rights": [[k, v, address(v)] for k, v in columns.items() if is_rights(k)],
            "file": original(self.files(name), metadata, self.page),
            "image": self.store(*encoded(picture)),
            **({"moving": moving, "frames": array.shape[1]} if clip else {}),
            "size": list(picture.size),
            "tiny": max(picture.size) <= TINY,
        }


class _Folder:
    """Writes pictures as numbered files beside the page, and returns their addresses.

    Files of an earlier page of the same name are deleted.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("[0-9]*.*"):
            old.unlink()
        self.folder, self.count = folder, 0

    def __call__(self, kind: str, content: bytes) -> str:
        name = f"{self.count:06d}.{kind}"
        (self.folder / name).write_bytes(content)
        self.count += 1
        return f"{quote(self.folder.name)}/{name}"
