"""The gallery as one PNG: each query in a row with the training examples behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dmin.attribution.ranking import Ranking, format_score, headline
from dmin.gallery.pictures import Images, fit, to_picture
from dmin.runtime.escape import printable

DPI = 150
FONTS = ("Inter", "Helvetica Neue", "Arial", "Liberation Sans")
MOST_GROUPS = 5  # of layers, that have a bar of their own
INK, MUTED, HAIRLINE, MAT, PAPER = "#17202a", "#66717d", "#dfe3e8", "#f2f4f6", "#ffffff"
ACCENT, AGAINST, AGREES = "#2565a8", "#c8553d", "#0b7a63"


@dataclass(frozen=True)
class _Layout:
    """Where everything stands, in pixels from the upper left corner."""

    rows: int
    columns: int
    bars: bool
    groups: int = 0
    margin: int = 64
    gap: int = 14
    aisle: int = 46
    strip: int = 224
    shares: int = 330
    header: int = 212
    lines: int = 96
    footer: int = 72
    page: int = 1800
    frame: int = 6

    @property
    def side(self) -> int:
        """Side of an image, so that the full number of columns fills the page."""
        taken = 2 * self.margin + self.aisle + (self.aisle + self.strip) * self.bars
        taken += (self.aisle + self.shares) * bool(self.groups)
        return max(48, min(176, (self.page - taken) // (self.columns + 1) - self.gap))

    @property
    def strip_left(self) -> int:
        return self.column(self.columns - 1) + self.side + self.aisle

    @property
    def shares_left(self) -> int:
        return self.strip_left + (self.strip + self.aisle) * self.bars

    @property
    def width(self) -> int:
        right = self.strip_left + self.strip if self.bars else self.strip_left - self.aisle
        right = self.shares_left + self.shares if self.groups else right
        return max(right + self.margin, 900)

    @property
    def height(self) -> int:
        return self.header + self.rows * (self.side + self.lines) + self.footer

    @property
    def left(self) -> int:
        """Edge on which the query's frame and all type to the left stand."""
        return self.margin - self.frame - 2

    def column(self, rank: int) -> int:
        return self.margin + self.side + self.aisle + rank * (self.side + self.gap)

    def row(self, query: int) -> int:
        return self.header + query * (self.side + self.lines)


def save_png(
    ranking: Ranking,
    query_images: Images,
    train_images: Images,
    path: str | Path,
    *,
    columns: int = 10,
    max_queries: int = 12,
    title: str | None = None,
) -> Path:
    """Draw each query beside its best training examples, and what timesteps and groups added.

    Args:
        ranking: the first `max_queries` queries and `columns` ranks are drawn.
        query_images: id of a query -> [C, H, W] in [0, 1], C of 1 or 3.
        train_images: the same for training examples.
        path: the PNG to write; its folder is made if it is not there.
        columns: training examples a row.
        max_queries: rows.
        title: headline; by default it says what the picture shows.

    Returns:
        The path. The picture is made for a column of 900 pixels on a dense screen (1800 pixels
        wide for ten columns, 150 dpi).

    Raises:
        DminError: an image has another shape or range.
    """
    columns = min(columns, ranking.scores.shape[1])
    rows = min(max_queries, len(ranking.query_ids))
    groups = min(len(ranking.groups), MOST_GROUPS)
    layout = _Layout(rows, columns, ranking.contributions is not None, groups)
    figure = Figure((layout.width / DPI, layout.height / DPI), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    # One page of axes in pixels: pictures are pasted at whole pixels, type is laid over them.
    page = figure.add_axes((0, 0, 1, 1))
    extent = (0.0, float(layout.width), float(layout.height), 0.0)
    page.imshow(_paste(ranking, query_images, train_images, layout), extent=extent, aspect="auto")
    page.set(xlim=extent[:2], ylim=extent[2:])
    page.set_axis_off()
    _draw_header(page, ranking, layout, title or headline(ranking))
    for query in range(rows):
        _draw_captions(page, ranking, query, layout)
    if ranking.contributions is not None:
        means = ranking.contributions[:rows, :columns].mean(axis=1)
        _draw_strips(page, means, ranking.timesteps, layout)
    if ranking.group_contributions is not None:
        _draw_shares(page, *_shares(ranking, layout), layout)
    _draw_legend(page, ranking, layout)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, format="png")
    return path


def _paste(
    ranking: Ranking, query_images: Images, train_images: Images, layout: _Layout
) -> np.ndarray:
    """Put every picture in its place, centred in its square, on an empty page [H, W, 3]."""
    page = Image.new("RGB", (layout.width, layout.height), PAPER)

    def put(array: np.ndarray, name: str, left: int, top: int) -> None:
        picture = fit(to_picture(array, name), layout.side).convert("RGB")
        offset = [(layout.side - length) // 2 for length in picture.size]
        page.paste(MAT, (left, top, left + layout.side, top + layout.side))
        page.paste(picture, (left + offset[0], top + offset[1]))

    for query in range(layout.rows):
        name, top = ranking.query_ids[query], layout.row(query)
        put(query_images(name), name, layout.margin, top)
        shown = min(layout.columns, ranking.count(query))
        for rank, example in enumerate(ranking.train_ids[query][:shown]):
            put(train_images(example), example, layout.column(rank), top)
    return np.asarray(page)


def _draw_header(page: Axes, ranking: Ranking, layout: _Layout, title: str) -> None:
    queries, k = ranking.scores.shape
    shown = f"top {layout.columns}" + (f" of {k}" if k > layout.columns else "")
    count = f"{layout.rows} of {queries} queries" if queries > layout.rows else f"{queries} queries"
    steps = f"  ·  {len(ranking.timesteps)} timesteps" if ranking.timesteps else ""
    _write(page, layout.left, 76, title, size=17, weight="bold")
    _write(page, layout.left, 114, f"{ranking.method}  ·  {shown}  ·  {count}{steps}", MUTED)
    top = layout.header - 22
    _write(page, layout.left, top, "query", ACCENT, weight="bold")
    for rank in range(layout.columns):
        _write(page, layout.column(rank) + layout.side / 2, top, str(rank + 1), MUTED, ha="center")
    if layout.bars:
        _write(page, layout.strip_left, top, "by timestep", MUTED)
    if layout.groups:
        _write(page, layout.shares_left, top, "by group of layers", MUTED)


def _draw_captions(page: Axes, ranking: Ranking, query: int, layout: _Layout) -> None:
    """Frame the pictures of a row and write below them: score and label, or id where no label."""
    top, side = layout.row(query), layout.side
    first, second = top + side + 28, top + side + 53
    _frame(page, layout.margin, top, side, layout.frame, ACCENT, 2.2)
    label = ranking.query_metadata[query].get("label")
    room = side + layout.aisle - 8
    name = _clip(ranking.query_ids[query], room, keep_end=True)
    _write(page, layout.left, first + 7, name, weight="bold")
    if label is not None:
        _write(page, layout.left, second + 7, _clip(f"label {label}", room), MUTED)
    for rank in range(min(layout.columns, ranking.count(query))):
        centre = layout.column(rank) + side / 2
        _frame(page, layout.column(rank), top, side, 0.5, HAIRLINE, 0.8)
        _write(page, centre, first, format_score(ranking.scores[query, rank]), ha="center")
        same, label = ranking.same_label(query, rank), ranking.label(query, rank)
        room = side if same is None else side - 26
        text = _clip(label or ranking.train_ids[query][rank], room, keep_end=label is None)
        text = {True: f"● {text}", False: f"○ {text}", None: text}[same]
        _write(page, centre, second, text, AGREES if same else MUTED, ha="center", size=10)


def _draw_strips(
    page: Axes, means: np.ndarray, timesteps: tuple[float, ...], layout: _Layout
) -> None:
    """Draw one bar a timestep, to one scale in all rows: [rows, T] means over the shown ranks."""
    above, below = max(float(means.max()), 0.0), max(-float(means.min()), 0.0)
    scale = layout.side / max(above + below, 1e-30)
    left, right = layout.strip_left, layout.strip_left + layout.strip
    width = layout.strip / (len(timesteps) + 0.25 * (len(timesteps) - 1))
    for query, row in enumerate(means):
        zero = layout.row(query) + above * scale
        for step, mean in enumerate(row):
            colour = ACCENT if mean >= 0 else AGAINST
            corner = (left + step * 1.25 * width, zero)
            page.add_patch(Rectangle(corner, width, -mean * scale, color=colour, linewidth=0))
        page.plot([left, right], [zero, zero], MUTED, linewidth=0.6)
        under = layout.row(query) + layout.side + 28
        _write(page, left, under, f"t {timesteps[0]:g}", MUTED, size=9.5)
        if len(timesteps) > 1:
            _write(page, right, under, f"{timesteps[-1]:g}", MUTED, size=9.5, ha="right")


def _shares(ranking: Ranking, layout: _Layout) -> tuple[list[str], np.ndarray]:
    """Return the groups that add most, and what each adds in each row; the others together."""
    assert ranking.group_contributions is not None
    means = ranking.group_contributions[: layout.rows, : layout.columns].mean(axis=1)
    largest = np.argsort(-np.abs(means).mean(axis=0), kind="stable")
    if len(largest) == layout.groups:
        return [ranking.groups[g] for g in largest], means[:, largest]
    own, rest = largest[: layout.groups - 1], largest[layout.groups - 1 :]
    names = [*(ranking.groups[g] for g in own), f"{len(rest)} others"]
    return names, np.column_stack([means[:, own], means[:, rest].sum(axis=1)])


def _draw_shares(page: Axes, names: list[str], means: np.ndarray, layout: _Layout) -> None:
    """Draw one lying bar a group of layers, to one scale in all rows: means over the ranks."""
    above, below = max(float(means.max()), 0.0), max(-float(means.min()), 0.0)
    middle = layout.shares_left + layout.shares // 2
    scale = (layout.shares - layout.shares // 2) / max(above + below, 1e-30)
    zero = middle + below * scale
    height = layout.side + 60  # down to the last line of type below the pictures
    pitch = min(32.0, height / len(names))
    size = min(9.5, 0.31 * pitch)
    for query, row in enumerate(means):
        top = layout.row(query)
        for number, (name, mean) in enumerate(zip(names, row, strict=True)):
            centre = top + (number + 0.5) * pitch
            colour = ACCENT if mean >= 0 else AGAINST
            corner = (zero, centre - 0.3 * pitch)
            page.add_patch(Rectangle(corner, mean * scale, 0.6 * pitch, color=colour, linewidth=0))
            text = _clip(name, (layout.shares // 2 - 16) * 11 / size, keep_end=True)
            _write(page, middle - 14, centre + 0.7 * size, text, MUTED, size=size, ha="right")
        page.plot([zero, zero], [top, top + pitch * len(names)], MUTED, linewidth=0.6)


def _draw_legend(page: Axes, ranking: Ranking, layout: _Layout) -> None:
    """Say at the foot what marks and bars mean, as far as there are any."""
    ranks = np.ndindex(layout.rows, layout.columns)
    notes = []
    if any(ranking.same_label(query, rank) is not None for query, rank in ranks):
        notes.append("● the query's label   ○ another label")
    if layout.bars or layout.groups:
        notes.append("bars: mean contribution to the scores shown, one scale for all rows")
    _write(page, layout.left, layout.height - 44, "   ·   ".join(notes), MUTED, size=9.5)


def _frame(
    page: Axes, left: float, top: float, side: int, space: float, color: str, linewidth: float
) -> None:
    corner, length = (left - space, top - space), side + 2 * space
    page.add_patch(Rectangle(corner, length, length, fill=False, ec=color, lw=linewidth))


def _write(
    page: Axes,
    x: float,
    y: float,
    text: str,
    color: str = INK,
    *,
    size: float = 11,
    weight: str = "normal",
    ha: str = "left",
) -> None:
    # A narrow sans-serif where one is installed; DejaVu comes with matplotlib.
    installed = set(font_manager.get_font_names())
    family = [*(name for name in FONTS if name in installed), "DejaVu Sans"]
    # parse_math off: an id with two dollar signs is a name, not a formula.
    style: dict[str, Any] = {"size": size, "weight": weight, "ha": ha, "family": family}
    page.text(x, y, printable(text), color=color, parse_math=False, **style)


def _clip(text: str, room: float, keep_end: bool = False) -> str:
    """Shorten a text to about `room` pixels: words are known by their start, ids by their end."""
    letters = max(4, int(room / 12.5))
    text = " ".join(text.split())
    if len(text) <= letters:
        return text
    return "…" + text[1 - letters :] if keep_end else text[: letters - 1].rstrip() + "…"
