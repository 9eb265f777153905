"""The gallery as an HTML page on which every answer is walked through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL.Image import Image

from dmin.attribution.ranking import Ranking, format_score, headline
from dmin.gallery.pictures import TINY, Images, data_uri, encoded, to_picture
from dmin.runtime.page import write_page

EMBED = 2000  # pictures of 10 to 40 kB: a page that still opens at once


def save_html(
    ranking: Ranking,
    query_images: Images,
    train_images: Images,
    path: str | Path,
    *,
    title: str | None = None,
    notes: dict[str, str] | None = None,
    embed: int = EMBED,
) -> Path:
    """Write a page on which every query can be walked through with the examples behind it.

    Args:
        ranking: all queries and all ranks are shown.
        query_images: id of a query -> [C, H, W] in [0, 1], C of 1 or 3.
        train_images: the same for training examples; asked once an id.
        path: the HTML file to write; its folder is made if it is not there.
        title: headline; by default it says what the page shows.
        notes: run settings to show in the head, such as `{"training examples": "1797"}`.
        embed: pictures that may stand in the page itself. Where there are more, they are files in
            the folder `<name of the page>_files` beside it, which a browser loads when it shows
            them: keep the two together.

    Returns:
        The path. Each image is kept once, at most 256 pixels a side: smaller ones as
        they are, larger ones scaled down (as PNG or JPEG, whichever is smaller).

    Raises:
        DminError: an image has another shape or range.
    """
    title = title or headline(ranking)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(ranking.query_ids) + len({id for row in ranking.train_ids for id in row})
    beside = None if count <= embed else path.with_name(f"{path.stem}_files")
    data = _data(ranking, query_images, train_images, title, notes or {}, beside)
    return write_page(Path(__file__).with_name("gallery"), title, data, path)


def _data(
    ranking: Ranking,
    query_images: Images,
    train_images: Images,
    title: str,
    notes: dict[str, str],
    beside: Path | None,
) -> dict[str, Any]:
    """Gather what the page shows; a training example that several queries share stands once."""
    examples: dict[str, dict[str, Any]] = {}
    address = data_uri if beside is None else _Folder(beside)
    for query, rank in ranking.places():
        name = ranking.train_ids[query][rank]
        if name not in examples:
            metadata = ranking.train_metadata[query][rank]
            entry = _entry(name, metadata, train_images(name), address)
            entry["row"] = int(ranking.train_rows[query, rank])
            entry["label"] = ranking.label(query, rank)
            if (size := ranking.spell_size(query, rank)) is not None:
                entry["meta"]["foremost"] = f"{size} examples"
            examples[name] = entry
    place = {name: index for index, name in enumerate(examples)}
    queries = []
    for query, name in enumerate(ranking.query_ids):
        entry = _entry(name, ranking.query_metadata[query], query_images(name), address)
        shown = ranking.count(query)
        entry["top"] = [place[example] for example in ranking.train_ids[query][:shown]]
        entry["scores"] = [format_score(score) for score in ranking.scores[query][:shown]]
        entry["sure"] = [ranking.spell_confidence(query, rank) for rank in range(shown)]
        entry["same"] = [ranking.same_label(query, rank) for rank in range(len(entry["top"]))]
        by = {"parts": ranking.contributions, "groupParts": ranking.group_contributions}
        for key, parts in by.items():
            if parts is not None:
                rows = parts[query][:shown]
                entry[key] = [[float(f"{part:.4g}") for part in row] for row in rows]
        queries.append(entry)
    return {
        "title": title,
        "method": ranking.method,
        "colours": {},
        "timesteps": [f"{t:g}" for t in ranking.timesteps],
        "groups": list(ranking.groups),
        "notes": {str(key): str(value) for key, value in {**notes, **ranking.notes}.items()},
        "queries": queries,
        "examples": list(examples.values()),
    }


def _entry(
    name: str, metadata: dict[str, Any], image: np.ndarray, address: Callable[[Image], str]
) -> dict[str, Any]:
    picture = to_picture(image, name)
    return {
        "id": name,
        "label": None if metadata.get("label") is None else str(metadata["label"]),
        "meta": {str(key): _text(value) for key, value in metadata.items()},
        "image": address(picture),
        "size": list(picture.size),
        "tiny": max(picture.size) <= TINY,
    }


class _Folder:
    """Writes pictures as numbered files beside the page, and gives their addresses.

    The files of an earlier page of this name are deleted: they would be of no use to anybody.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("[0-9]*.*"):
            old.unlink()
        self.folder, self.count = folder, 0

    def __call__(self, picture: Image) -> str:
        kind, content = encoded(picture)
        name = f"{self.count:06d}.{kind}"
        (self.folder / name).write_bytes(content)
        self.count += 1
        return f"{quote(self.folder.name)}/{name}"


def _text(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
