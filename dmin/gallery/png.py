"""The gallery as one PNG: each query in a row with the training examples behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dmin.attribution.place_maps import Places, PlacesOf
from dmin.attribution.ranking import Ranking, format_score, headline
from dmin.attribution.wording import spell_about, spell_blind, spell_copies, spell_query
from dmin.gallery.pictures import Images, fit, overlaid, to_picture
from dmin.gallery.png_bars import MOST_GROUPS, draw_shares, draw_strips
from dmin.gallery.png_page import (
    ACCENT,
    AGAINST,
    AGREES,
    HAIRLINE,
    INK,
    MAT,
    MUTED,
    NOTE,
    PAPER,
    Layout,
    clip,
    frame,
    write,
)

DPI = 150
SMALL = 9.5  # size of small type, in points
LETTER = 10.6  # approximate width of a small letter, in pixels; DejaVu is the widest font
MOST_NOTES = 3  # most lines below a row


@dataclass(frozen=True)
class _Row:
    """The answer of one method to one query."""

    ranking: Ranking
    query: int
    cards: list[int]  # ranks shown
    leads: bool  # whether the row begins with the query's picture
    named: bool  # whether to write the method's name: several methods are shown
    places: PlacesOf | None = None  # this row has the attribution maps of the row above

    @property
    def shown(self) -> Sequence[tuple[int, int]]:
        """Column and rank of every card."""
        found = list(enumerate(self.cards))
        return found if self.places is None else [c for c in found if self.maps(c[1])]

    def maps(self, rank: int) -> Places | None:
        """Return the attribution maps of a card, if they were computed."""
        id, asked = self.ranking.train_ids[self.query][rank], self.ranking.query_ids[self.query]
        return (self.places or {}).get((self.ranking.method, asked, id))


def save_png(
    rankings: Ranking | Sequence[Ranking],
    query_images: Images,
    train_images: Images,
    path: str | Path,
    *,
    columns: int = 10,
    max_queries: int = 12,
    title: str | None = None,
    places: PlacesOf | None = None,
) -> Path:
    """Draw each query beside its best training examples, with contributions to their scores.

    Args:
        rankings: the first `max_queries` queries and `columns` cards are drawn; copies of one
            picture share a card. Answers of several methods to the same queries are drawn one
            below the other.
        query_images: id of a query -> [C, H, W] in [0, 1], C of 1 or 3.
        train_images: the same for training examples.
        path: the PNG to write; its folder is created if it does not exist.
        columns: training examples per row.
        max_queries: most queries drawn.
        title: headline; None: a description of what the picture shows.
        places: attribution maps (`dmin.places`), drawn in rows of their own.

    Returns:
        The path. The picture fits a column of 900 pixels on a dense screen (1800 pixels wide for
        ten columns, 150 dpi).

    Raises:
        DminError: an image has another shape or range.
    """
    answers = [rankings] if isinstance(rankings, Ranking) else list(rankings)
    first = answers[0]
    columns = min(columns, max(each.scores.shape[1] for each in answers))
    queries = range(min(max_queries, len(first.query_ids)))
    rows = [
        _Row(each, query, each.cards(query)[:columns], each is first, len(answers) > 1, own)
        for query in queries
        for each in answers
        for own in ([None, places] if places else [None])
    ]
    bars = any(each.contributions is not None for each in answers)
    groups = max(min(len(each.groups), MOST_GROUPS) for each in answers)
    layout = Layout(len(rows), columns, bars, groups)
    notes = [
        [] if row.places else _wrapped(spell_query(row.ranking, row.query), layout) for row in rows
    ]
    head = _head(answers, layout, len(queries))
    layout = Layout(len(rows), columns, bars, groups, max(map(len, notes)), len(head))
    page, figure = _page(layout)
    pasted = _paste(rows, query_images, train_images, layout)
    page.imshow(pasted, extent=(0, layout.width, layout.height, 0), aspect="auto")
    page.set(xlim=(0, layout.width), ylim=(layout.height, 0))
    _draw_header(page, rows, layout, title or headline(first), head)
    for place, row in enumerate(rows):
        _draw_captions(page, row, place, layout)
        for line, text in enumerate(notes[place]):
            under = layout.row(place) + layout.side + 82 + line * NOTE
            write(page, layout.column(0), under, text, MUTED, size=SMALL)
    for number, each in enumerate(answers):
        per = 2 if places else 1
        mine = range(per * number, len(rows), per * len(answers))
        if each.contributions is not None:
            draw_strips(page, each, mine, columns, layout)
        if each.group_contributions is not None:
            draw_shares(page, each, mine, layout)
    _draw_legend(page, rows, layout)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, format="png")
    return path


def _page(layout: Layout) -> tuple[Axes, Figure]:
    """Return axes in pixels: pictures are pasted at whole pixels, text is drawn over them."""
    figure = Figure((layout.width / DPI, layout.height / DPI), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    page = figure.add_axes((0, 0, 1, 1))
    page.set_axis_off()
    return page, figure


def _wrapped(parts: Sequence[str], layout: Layout) -> list[str]:
    """Wrap notes to the width of the pictures, at most `MOST_NOTES` lines."""
    letters = max(40, int((layout.strip_left - layout.aisle - layout.column(0)) / LETTER))
    text = "  ·  ".join(parts).replace(" = ", "\u00a0=\u00a0")  # no line break around "="
    return wrap(text, letters, max_lines=MOST_NOTES, placeholder=" …")


def _head(answers: Sequence[Ranking], layout: Layout, shown: int) -> list[str]:
    """Return the lines of the header: methods and sizes, model and store, blind timesteps."""
    first, methods = answers[0], ", ".join(each.method for each in answers)
    queries, k = first.scores.shape
    top = f"top {layout.columns}" + (f" of {k}" if k > layout.columns else "")
    count = f"{shown} of {queries} queries" if queries > shown else f"{queries} queries"
    steps = f"  ·  {len(first.timesteps)} timesteps" if first.timesteps else ""
    letters = int((layout.width - 2 * layout.margin) / LETTER)
    blind = next((text for each in answers if (text := spell_blind(each))), None)
    return [
        f"{methods}  ·  {top}  ·  {count}{steps}",
        *wrap("  ·  ".join(spell_about(first)), letters),
        *wrap(f"{blind}." if blind else "", letters),
    ]


def _paste(
    rows: Sequence[_Row], query_images: Images, train_images: Images, layout: Layout
) -> np.ndarray:
    """Return a page [H, W, 3] with every picture centred in its square."""
    page = Image.new("RGB", (layout.width, layout.height), PAPER)

    def put(picture: Image.Image, left: int, top: int) -> None:
        picture = fit(picture, layout.side).convert("RGB")
        offset = [(layout.side - length) // 2 for length in picture.size]
        page.paste(MAT, (left, top, left + layout.side, top + layout.side))
        page.paste(picture, (left + offset[0], top + offset[1]))

    for place, row in enumerate(rows):
        name, top = row.ranking.query_ids[row.query], layout.row(place)
        if row.places is not None:
            _put_places(row, query_images, train_images, put, layout, top)
            continue
        if row.leads:
            put(to_picture(query_images(name), name), layout.margin, top)
        for column, rank in row.shown:
            example = row.ranking.train_ids[row.query][rank]
            put(to_picture(train_images(example), example), layout.column(column), top)
    return np.asarray(page)


def _put_places(
    row: _Row, query_images: Images, train_images: Images, put: Any, layout: Layout, top: int
) -> None:
    """Paste the attribution maps of the cards, and the query's map for the first card."""
    name = row.ranking.query_ids[row.query]
    for number, (column, rank) in enumerate(row.shown):
        maps, example = row.maps(rank), row.ranking.train_ids[row.query][rank]
        assert maps is not None
        picture = to_picture(train_images(example), example)
        put(overlaid(picture, maps.train), layout.column(column), top)
        if number == 0 and maps.query is not None:
            picture = to_picture(query_images(name), name)
            put(overlaid(picture, maps.query), layout.margin, top)


def _draw_header(
    page: Axes, rows: Sequence[_Row], layout: Layout, title: str, head: Sequence[str]
) -> None:
    write(page, layout.left, 76, title, size=17, weight="bold")
    blind = sum(text.endswith(".") for text in head[1:])
    for number, text in enumerate(head):
        colour = AGAINST if number >= len(head) - blind else MUTED
        write(page, layout.left, 114 + NOTE * number, text, colour, size=SMALL if number else 11)
    top = layout.header - 22
    write(page, layout.left, top, "query", ACCENT, weight="bold")
    for column in range(0 if _collapsed(rows) else layout.columns):
        centre = layout.column(column) + layout.side / 2
        write(page, centre, top, str(column + 1), MUTED, ha="center")
    if layout.bars:
        write(page, layout.strip_left, top, "by timestep", MUTED)
    if layout.groups:
        write(page, layout.shares_left, top, "by group of layers", MUTED)


def _collapsed(rows: Sequence[_Row]) -> bool:
    """Return whether some card's column differs from its rank, so that ranks are written."""
    return any(column != rank for row in rows for column, rank in row.shown)


def _draw_captions(page: Axes, row: _Row, place: int, layout: Layout) -> None:
    """Frame the pictures of a row and write below them the score, and the label or else the id."""
    top, side, ranking, query = layout.row(place), layout.side, row.ranking, row.query
    first, second = top + side + 28, top + side + 53
    room = side + layout.aisle - 8
    if row.places is not None:
        for number, (column, rank) in enumerate(row.shown):
            maps, centre = row.maps(rank), layout.column(column) + side / 2
            assert maps is not None
            if number == 0:
                write(page, layout.left, first + 7, "attribution map", MUTED, size=10)
            write(page, centre, first, maps.spell(), MUTED, ha="center", size=10)
        return
    if row.leads:
        frame(page, layout.margin, top, side, layout.frame, ACCENT, 2.2)
        label = ranking.query_metadata[query].get("label")
        name = clip(ranking.query_ids[query], room, keep_end=True)
        write(page, layout.left, first + 7, name, weight="bold")
        if label is not None:
            write(page, layout.left, second + 7, clip(f"label {label}", room), MUTED)
    if row.named:
        under = second + 32 if row.leads else top + side / 2
        write(page, layout.left, under, clip(ranking.method, room), ACCENT, weight="bold")
    for column, rank in row.shown:
        centre = layout.column(column) + side / 2
        frame(page, layout.column(column), top, side, 0.5, HAIRLINE, 0.8)
        score = format_score(ranking.scores[query, rank])
        write(page, centre, first, score if rank == column else f"{rank + 1}: {score}", ha="center")
        same, label = ranking.same_label(query, rank), ranking.label(query, rank)
        room = side if same is None else side - 26
        text = clip(label or ranking.train_ids[query][rank], room, keep_end=label is None)
        text = {True: f"● {text}", False: f"○ {text}", None: text}[same]
        write(page, centre, second, text, AGREES if same else MUTED, ha="center", size=10)
        if (copies := spell_copies(ranking, query, rank)) is not None:
            corner = layout.column(column) + side - 6
            write(page, corner, top + 24, copies, INK, size=SMALL, ha="right", paper=PAPER)


def _draw_legend(page: Axes, rows: Sequence[_Row], layout: Layout) -> None:
    """Write below the rows what the marks and bars that occur mean."""
    notes = []
    cards = [(row.ranking, row.query, rank) for row in rows for _, rank in row.shown]
    if any(ranking.same_label(query, rank) is not None for ranking, query, rank in cards):
        notes.append("● the query's label   ○ another label")
    if any(ranking.copies(query, rank) for ranking, query, rank in cards):
        notes.append("×: examples with the same pixels; their first rank is before the score")
    if any(row.places for row in rows):
        notes.append("maps: blue raises the score, red lowers it; sums differ by sketching error")
    if layout.bars:
        notes.append("blue and red: mean contribution to the scores shown")
        notes.append("grey below: share in their order")
    elif layout.groups:
        notes.append("bars: mean contribution to the scores shown")
    if any(row.ranking.blind for row in rows):
        notes.append("× below a bar: a blind timestep")
    lines = wrap("   ·   ".join(notes), int((layout.width - 2 * layout.margin) / LETTER))
    for number, text in enumerate(lines):
        under = layout.height - 44 - NOTE * (len(lines) - 1 - number)
        write(page, layout.left, under, text, MUTED, size=SMALL)
