"""The layout of the gallery's PNG: positions in pixels, and text."""

from dataclasses import dataclass
from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dmin.runtime.escape import printable

FONTS = ("Inter", "Helvetica Neue", "Arial", "Liberation Sans")
INK, MUTED, HAIRLINE, MAT, PAPER = "#17202a", "#66717d", "#dfe3e8", "#f2f4f6", "#ffffff"
ACCENT, AGAINST, AGREES = "#2565a8", "#c8553d", "#0b7a63"
NOTE = 25  # height of a line of small type, in pixels


@dataclass(frozen=True)
class Layout:
    """The positions of everything, in pixels from the upper left corner."""

    rows: int
    columns: int
    bars: bool
    groups: int = 0
    notes: int = 0  # lines of text below a row
    head: int = 0  # lines of text in the header
    margin: int = 64
    gap: int = 14
    aisle: int = 46
    strip: int = 224
    shares: int = 330
    lines: int = 96
    footer: int = 72
    page: int = 1800
    frame: int = 6

    @property
    def header(self) -> int:
        """Height of the header, where the first row begins."""
        return 186 + NOTE * self.head

    @property
    def side(self) -> int:
        """Side of an image: the full number of columns fills the page."""
        taken = 2 * self.margin + self.aisle + (self.aisle + self.strip) * self.bars
        taken += (self.aisle + self.shares) * bool(self.groups)
        return max(48, min(176, (self.page - taken) // (self.columns + 1) - self.gap))

    @property
    def strip_left(self) -> int:
        """Left edge of the bars of timesteps."""
        return self.column(self.columns - 1) + self.side + self.aisle

    @property
    def shares_left(self) -> int:
        """Left edge of the bars of groups."""
        return self.strip_left + (self.strip + self.aisle) * self.bars

    @property
    def width(self) -> int:
        """Width of the page."""
        right = self.strip_left + self.strip if self.bars else self.strip_left - self.aisle
        right = self.shares_left + self.shares if self.groups else right
        return max(right + self.margin, 900)

    @property
    def height(self) -> int:
        """Height of the page."""
        return self.header + self.rows * self.pitch + self.footer

    @property
    def pitch(self) -> int:
        """Distance from one row to the next."""
        return self.side + self.lines + NOTE * self.notes

    @property
    def left(self) -> int:
        """Left edge of the query's frame and of text in its column."""
        return self.margin - self.frame - 2

    def column(self, rank: int) -> int:
        """Return the left edge of a column of pictures."""
        return self.margin + self.side + self.aisle + rank * (self.side + self.gap)

    def row(self, query: int) -> int:
        """Return the upper edge of a row of pictures."""
        return self.header + query * self.pitch


def frame(
    page: Axes, left: float, top: float, side: int, space: float, color: str, linewidth: float
) -> None:
    """Draw a frame around a picture, at a distance."""
    corner, length = (left - space, top - space), side + 2 * space
    page.add_patch(Rectangle(corner, length, length, fill=False, ec=color, lw=linewidth))


def write(
    page: Axes,
    x: float,
    y: float,
    text: str,
    color: str = INK,
    *,
    size: float = 11,
    weight: str = "normal",
    ha: str = "left",
    paper: str | None = None,
) -> None:
    """Write a line of text on the baseline y, on a background ``paper`` if one is given."""
    # A narrow sans-serif if one is installed; DejaVu comes with matplotlib.
    installed = set(font_manager.get_font_names())
    family = [*(name for name in FONTS if name in installed), "DejaVu Sans"]
    # parse_math is off, because an id with two dollar signs is not a formula.
    style: dict[str, Any] = {"size": size, "weight": weight, "ha": ha, "family": family}
    if paper is not None:
        style["bbox"] = {"facecolor": paper, "edgecolor": "none", "pad": 1.5}
    page.text(x, y, printable(text), color=color, parse_math=False, **style)


def clip(text: str, room: float, keep_end: bool = False) -> str:
    """Shorten a text to about `room` pixels, keeping its start or, for ids, its end."""
    letters = max(4, int(room / 12.5))
    text = " ".join(text.split())
    if len(text) <= letters:
        return text
    return "…" + text[1 - letters :] if keep_end else text[: letters - 1].rstrip() + "…"
