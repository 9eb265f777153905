"""A contact sheet: pictures in reading order, each with its name and value."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dmin.gallery.pictures import fit, to_picture
from dmin.runtime.escape import printable

DPI = 150
SIDE = 160  # side of a picture, in pixels
INK, MUTED = "#17202a", "#66717d"


def save_sheet(
    images: Sequence[np.ndarray],
    names: Sequence[str],
    figures: Sequence[str],
    path: str | Path,
    *,
    title: str,
    columns: int = 8,
) -> Path:
    """Draw pictures in rows, the first at the upper left.

    Args:
        images: [C, H, W] in [0, 1], C of 1 or 3; at least one.
        names: the first line below each picture.
        figures: the second line.
        path: the PNG to write; its folder is created if it does not exist.
        title: headline.
        columns: pictures per row.

    Returns:
        The path.

    Raises:
        DminError: an image has another shape or range.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = max(columns * 1.2, 5.0), 0.6 + rows * 1.55
    figure = Figure((width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.3 / height, title, color=INK, weight="bold", va="center")
    grid = figure.add_gridspec(rows, columns, left=0.02, right=0.98, bottom=0.3 / height)
    grid.update(top=1 - 0.6 / height, hspace=0.5)
    for place, (image, name, number) in enumerate(zip(images, names, figures, strict=True)):
        axes = figure.add_subplot(grid[place // columns, place % columns])
        axes.imshow(np.asarray(fit(to_picture(image, name), SIDE).convert("RGB")))
        axes.set_axis_off()
        below: dict[str, Any] = dict(transform=axes.transAxes, ha="center", va="top", clip_on=False)
        below |= dict(fontsize=7, parse_math=False)
        axes.text(0.5, -0.03, printable(shortened(name)), color=INK, **below)
        axes.text(0.5, -0.18, printable(number), color=MUTED, **below)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, format="png")
    return path


def shortened(name: str, most: int = 18) -> str:
    """Return a name that fits below a picture: its end, by which files differ."""
    return name if len(name) <= most else "…" + name[1 - most :]
