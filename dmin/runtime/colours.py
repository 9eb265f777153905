"""One colour for each method, the same in all pictures and pages of a run."""

import colorsys
from collections.abc import Mapping
from typing import NamedTuple

GREYS = (0.08, 30, 30)
FAMILIES = {"none": GREYS, "gradient": (0.7, 178, 250), "curvature": (0.6, 268, 500)}
"""Saturation and range of hues, in degrees: greys look at no gradient, blues compare plain
gradients; violet to green, with red between them, go through a curvature."""
EVERYTHING = (0.65, 210, 570)
ON_LIGHT, ON_DARK = (0.13, 0.22, 0.07), (0.36, 0.5, 0.26)
GOLDEN = 0.618034


class Colour(NamedTuple):
    """A colour as ``#rrggbb``, for light paper and for dark."""

    light: str
    dark: str


def method_colours(families: Mapping[str, str]) -> dict[str, Colour]:
    """Return a colour for each method.

    Args:
        families: of each method its family, a name in `FAMILIES`; of any other name methods are
            spread over all hues. The order decides the colours, so give all methods of a run.

    Returns:
        The colours; each has a contrast of at least 3 to its paper.
    """
    seen: dict[str, int] = {}
    found = {}
    for method, family in families.items():
        seen[family] = place = seen.get(family, -1) + 1
        saturation, low, high = FAMILIES.get(family, EVERYTHING)
        hue = low + (high - low) * (place * GOLDEN % 1)
        light, dark = (tones[place % 3] for tones in (ON_LIGHT, ON_DARK))
        found[method] = Colour(_of(hue, saturation, light), _of(hue, saturation, dark))
    return found


def _of(hue: float, saturation: float, luminance: float) -> str:
    """Return the colour of a hue that is as bright as wanted, whatever the hue."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        rgb = colorsys.hls_to_rgb(hue / 360 % 1, middle, saturation)
        low, high = (middle, high) if _luminance(rgb) < luminance else (low, middle)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _luminance(rgb: tuple[float, float, float]) -> float:
    """Return the relative luminance of sRGB, as WCAG defines it."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
