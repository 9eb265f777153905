"""The bars of the gallery's PNG: contributions of timesteps and groups of layers."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dmin.attribution.ranking import Ranking
from dmin.gallery.png_page import ACCENT, AGAINST, MUTED, Layout, clip, write

MOST_GROUPS = 5  # most groups of layers with their own bar


def draw_strips(
    page: Axes, ranking: Ranking, rows: Sequence[int], columns: int, layout: Layout
) -> None:
    """Draw each timestep's mean contribution to the scores shown, and its share in their order.

    Args:
        page: to draw on.
        ranking: of one method; all rows have the same scale.
        rows: row of the page for each query.
        columns: number of examples shown.
        layout: of the page.
    """
    assert ranking.contributions is not None and ranking.order_shares is not None
    means = ranking.contributions[: len(rows), :columns].mean(axis=1)
    shares = np.nan_to_num(ranking.order_shares[: len(rows)])
    upper = 0.7 * layout.side if shares.any() else layout.side
    scales = [_scale(part) for part in (means, shares)]
    blind = set(ranking.blind or ())
    for place, mean, share in zip(rows, means, shares, strict=True):
        top = layout.row(place)
        _bars(page, mean, top, upper, scales[0], layout, (ACCENT, AGAINST))
        if shares.any():
            lower = 0.9 * (layout.side - upper)
            _bars(page, share, top + layout.side - lower, lower, scales[1], layout, (MUTED, MUTED))
        _axis(page, ranking.timesteps, blind, top + layout.side + 28, layout)


def _scale(parts: np.ndarray) -> tuple[float, float]:
    """Return the largest extent of bars above and below zero."""
    return max(float(parts.max()), 0.0), max(-float(parts.min()), 0.0)


def _bars(
    page: Axes,
    values: np.ndarray,
    top: float,
    height: float,
    reach: tuple[float, float],
    layout: Layout,
    colours: tuple[str, str],
) -> None:
    """Draw one bar per timestep between two heights."""
    above, below = reach
    scale = height / max(above + below, 1e-30)
    zero, width = top + above * scale, _width(len(values), layout)
    for step, value in enumerate(values):
        corner = (layout.strip_left + step * 1.25 * width, zero)
        colour = colours[0] if value >= 0 else colours[1]
        page.add_patch(Rectangle(corner, width, -value * scale, color=colour, linewidth=0))
    right = layout.strip_left + layout.strip
    page.plot([layout.strip_left, right], [zero, zero], MUTED, linewidth=0.6)


def _axis(
    page: Axes, timesteps: tuple[float, ...], blind: set[float], under: float, layout: Layout
) -> None:
    """Write the first and the last timestep, and a cross below each blind one."""
    width, right = _width(len(timesteps), layout), layout.strip_left + layout.strip
    write(page, layout.strip_left, under, f"t {timesteps[0]:g}", MUTED, size=9.5)
    if len(timesteps) > 1:
        write(page, right, under, f"{timesteps[-1]:g}", MUTED, size=9.5, ha="right")
    for step, timestep in enumerate(timesteps):
        if timestep in blind:
            centre = layout.strip_left + step * 1.25 * width + width / 2
            write(page, centre, under + 25, "×", AGAINST, size=9.5, ha="center")


def _width(steps: int, layout: Layout) -> float:
    return layout.strip / (steps + 0.25 * (steps - 1))


def _shares(ranking: Ranking, rows: int, layout: Layout) -> tuple[list[str], np.ndarray]:
    """Return the groups with the largest contributions, by row; the others are summed."""
    assert ranking.group_contributions is not None
    means = ranking.group_contributions[:rows, : layout.columns].mean(axis=1)
    largest = np.argsort(-np.abs(means).mean(axis=0), kind="stable")
    if len(largest) == layout.groups:
        return [ranking.groups[g] for g in largest], means[:, largest]
    own, rest = largest[: layout.groups - 1], largest[layout.groups - 1 :]
    names = [*(ranking.groups[g] for g in own), f"{len(rest)} others"]
    return names, np.column_stack([means[:, own], means[:, rest].sum(axis=1)])


def draw_shares(page: Axes, ranking: Ranking, rows: Sequence[int], layout: Layout) -> None:
    """Draw one horizontal bar per group of layers; arguments as in :func:`draw_strips`."""
    names, means = _shares(ranking, len(rows), layout)
    above, below = max(float(means.max()), 0.0), max(-float(means.min()), 0.0)
    middle = layout.shares_left + layout.shares // 2
    scale = (layout.shares - layout.shares // 2) / max(above + below, 1e-30)
    zero = middle + below * scale
    height = layout.side + 60  # down to the last line of text below the pictures
    pitch = min(32.0, height / len(names))
    size = min(9.5, 0.31 * pitch)
    for place, row in zip(rows, means, strict=True):
        top = layout.row(place)
        for number, (name, mean) in enumerate(zip(names, row, strict=True)):
            centre = top + (number + 0.5) * pitch
            colour = ACCENT if mean >= 0 else AGAINST
            corner = (zero, centre - 0.3 * pitch)
            page.add_patch(Rectangle(corner, mean * scale, 0.6 * pitch, color=colour, linewidth=0))
            text = clip(name, (layout.shares // 2 - 16) * 11 / size, keep_end=True)
            write(page, middle - 14, centre + 0.7 * size, text, MUTED, size=size, ha="right")
        page.plot([zero, zero], [top, top + pitch * len(names)], MUTED, linewidth=0.6)
