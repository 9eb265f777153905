"""Generated colour images of captioned shapes, in any number, without a download."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from dmin.data.base import Example, Facts
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import array_digest

COLOURS = {
    "red": (0.85, 0.13, 0.15),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.97, 0.83, 0.14),
    "green": (0.16, 0.62, 0.25),
    "blue": (0.15, 0.35, 0.85),
    "purple": (0.52, 0.20, 0.68),
    "pink": (0.96, 0.50, 0.70),
}
BACKGROUNDS = {
    "white": (0.96, 0.96, 0.96),
    "grey": (0.60, 0.61, 0.63),
    "black": (0.09, 0.09, 0.11),
    "blue": (0.36, 0.58, 0.86),
    "green": (0.50, 0.74, 0.50),
}
SIZES = {"small": 0.44, "medium": 0.58, "large": 0.78}  # radius; the image is 2 wide
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TEXTURES = ("plain", "striped", "checked", "dotted")
SOURCES = ("studio", "print")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "size": tuple(SIZES),
    "background": tuple(BACKGROUNDS),
    "source": SOURCES,
}

# Increased whenever the drawing changes for equal settings.
RECIPE = 1
# Numbers of the held-out images start here, so that none is ever a training image.
_HELDOUT = 1_000_000
_FINE = 4  # supersampling factor, for smooth edges

Colour = tuple[float, float, float]


@dataclass(eq=False, repr=False)
class Shapes:
    """Images such as "a small red striped triangle on a blue background", with known attributes.

    An image depends only on its number and the seed. A minority has the *source* ``print``: faded
    inks on grainy paper, with an outline. Captions do not mention the source, so an attribution
    method must find the prints for a print-like query by the image alone.

    Args:
        split: ``train`` or ``heldout``; they share no image.
        examples: number of images; a larger number does not change the first ones.
        size: height and width in pixels.
        label: the attribute used as label; labels are positions among its values.
        minority: fraction of images with the source ``print``, in [0, 1].
        seed: key of all images.

    Raises:
        DminError: a setting is invalid.
    """

    split: Literal["train", "heldout"] = "train"
    examples: int = 2000
    size: int = 32
    label: Literal["shape", "colour", "texture", "size", "background", "source"] = "shape"
    minority: float = 0.04
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        choices = {"split": ("train", "heldout"), "label": (*ATTRIBUTES,)}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise DminError(f"data.{name}={value!r}: choose one of {', '.join(allowed)}.")
        fits = 1 <= self.examples <= _HELDOUT and self.size >= 8
        if not fits or not 0 <= self.minority <= 1 or self.seed < 0:
            raise DminError(
                f"data.examples={self.examples}, data.size={self.size}, data.minority="
                f"{self.minority}, data.seed={self.seed}: at most {_HELDOUT:,} examples, one or "
                f"more, of 8 pixels or more, a minority in [0, 1] and a seed of 0 or more are "
                f"needed."
            )

    @property
    def numbers(self) -> range:
        """The numbers of the images, from which they are drawn."""
        start = _HELDOUT if self.split == "heldout" else 0
        return range(start, start + self.examples)

    @property
    def ids(self) -> list[str]:
        """The ids of the images, in order."""
        return [_id(number) for number in self.numbers]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        """Draw one example."""
        number = self.numbers[index]
        rng = _generator(self.seed, number)
        facts = _facts(rng, self.minority)
        label = ATTRIBUTES[self.label].index(facts[self.label])
        image = torch.from_numpy(_draw(facts, self.size, rng))
        return Example(_id(number), image, label, caption(facts), facts)

    def facts(self, index: int) -> Facts:
        """Return what is known about an image besides its pixels, without drawing it."""
        facts = _facts(_generator(self.seed, self.numbers[index]), self.minority)
        return Facts(ATTRIBUTES[self.label].index(facts[self.label]), caption(facts), facts)

    def describe(self) -> dict[str, Any]:
        """Return the settings, and a digest of a few images, which shows changes of the drawing."""
        few = [self[index].image.numpy() for index in range(min(8, len(self)))]
        return {
            "name": type(self).__name__,
            **asdict(self),
            "recipe": RECIPE,
            "first": array_digest(*few),
        }


def caption(facts: dict[str, str]) -> str:
    """Return a sentence with an image's attributes except the source."""
    texture = "" if facts["texture"] == "plain" else f" {facts['texture']}"
    return (
        f"a {facts['size']} {facts['colour']}{texture} {facts['shape']} "
        f"on a {facts['background']} background"
    )


def _id(number: int) -> str:
    return f"shape-{number:07d}"


def _generator(seed: int, number: int) -> np.random.Generator:
    """Return the random generator of an image.

    Only ``random()`` is used, whose stream is the same in every version of NumPy.
    """
    return np.random.Generator(np.random.PCG64([seed, number]))


def _facts(rng: np.random.Generator, minority: float) -> dict[str, str]:
    def draw(values: tuple[str, ...]) -> str:
        return values[int(rng.random() * len(values))]

    facts = {name: draw(values) for name, values in ATTRIBUTES.items() if name != "background"}
    unlike = tuple(name for name in BACKGROUNDS if name != facts["colour"])
    facts["background"] = draw(unlike)
    facts["source"] = SOURCES[rng.random() < minority]
    return facts


def _draw(facts: dict[str, str], size: int, rng: np.random.Generator) -> np.ndarray:
    """Return the image, float32 ``[3, size, size]`` in [0, 1]."""
    axis = (np.arange(size * _FINE) + 0.5) * (2 / (size * _FINE)) - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    radius = SIZES[facts["size"]] * _between(rng, 0.92, 1.08)
    room = max(0.0, 0.92 - radius)  # the whole shape stays inside
    x, y = x - _between(rng, -room, room), y - _between(rng, -room, room)
    tilt = _between(rng, -0.22, 0.22)
    u = (np.cos(tilt) * x + np.sin(tilt) * y) / radius
    v = (np.cos(tilt) * y - np.sin(tilt) * x) / radius
    depth = _inside(facts["shape"], u, v)
    pattern = _pattern(facts["texture"], x, y, _between(rng, 0, np.pi), rng.random())
    ink, paper = COLOURS[facts["colour"]], BACKGROUNDS[facts["background"]]
    draw = _draw_print if facts["source"] == "print" else _draw_studio
    fine = draw(ink, paper, depth, pattern, y)
    smooth = fine.reshape(3, size, _FINE, size, _FINE).mean((2, 4))
    grain = 0.14 if facts["source"] == "print" else 0.0
    tone = _between(rng, -0.04, 0.04) + grain * (rng.random((size, size)) - 0.5)
    # Rounded to 8 bits: saving as PNG is exact, and the last digits of a cosine, which differ
    # between processors, have no effect.
    return np.round(np.clip(smooth + tone, 0, 1) * 255).astype(np.float32) / 255


def _draw_studio(
    ink: Colour, paper: Colour, depth: np.ndarray, pattern: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Bright colours, a texture unlike ink and paper, a backdrop that darkens downwards."""
    light, dark = (1.0, 1.0, 1.0), (0.1, 0.1, 0.15)
    second = _mix(ink, dark, 0.55) if min(paper) > 0.9 else _mix(ink, light, 0.72)
    shape = np.where(pattern, _colour(second), _colour(ink))
    backdrop = _colour(paper) * (1 - 0.06 * np.tanh(y))
    return np.where(depth > 0, shape, backdrop)


def _draw_print(
    ink: Colour, paper: Colour, depth: np.ndarray, pattern: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Inks faded towards sepia, with a dark second ink in the texture and an outline."""
    sepia, dark = (0.78, 0.68, 0.50), (0.20, 0.14, 0.10)
    faded = _mix(ink, sepia, 0.45)
    shape = np.where(pattern, _colour(_mix(faded, dark, 0.55)), _colour(faded))
    shape = np.where(depth < 0.16, _colour(dark), shape)
    return np.where(depth > 0, shape, _colour(_mix(paper, sepia, 0.55)))


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the depth of points inside a shape of radius 1; negative outside."""
    r = np.hypot(u, v)
    across, along = np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
    if shape == "circle":
        return 0.92 - r
    if shape == "square":
        return 0.80 - along
    if shape == "cross":
        return np.minimum(0.32 - across, 0.95 - along)
    if shape == "ring":
        return np.minimum(0.95 - r, r - 0.48)
    points, dent = (3, 0.5) if shape == "triangle" else (5, 0.42)
    # The edge from a tip (radius 1, angle 0) to a dent (radius dent, angle π/points).
    angle = np.arctan2(u, -v) % (2 * np.pi / points)
    angle = np.minimum(angle, 2 * np.pi / points - angle)
    end = np.array([dent * np.cos(np.pi / points), dent * np.sin(np.pi / points)])
    normal = np.array([end[1], 1 - end[0]]) / np.hypot(end[1], 1 - end[0])
    return normal[0] - r * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1])


def _pattern(texture: str, x: np.ndarray, y: np.ndarray, angle: float, phase: float) -> np.ndarray:
    """Return where the second colour is; periods are relative to the image, not to the shape."""
    if texture == "plain":
        return np.zeros_like(x, dtype=bool)
    if texture == "striped":
        wave = (np.cos(angle) * x + np.sin(angle) * y) / 0.36 + phase
        return wave % 1 < 0.45
    a, b = x / 0.28 + phase, y / 0.28 + phase
    if texture == "checked":
        return (np.floor(a) + np.floor(b)) % 2 == 0
    a, b = x / 0.34 + phase, y / 0.34 + phase
    return np.hypot(a % 1 - 0.5, b % 1 - 0.5) < 0.32


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    a, b, c = ((1 - share) * p + share * q for p, q in zip(one, other, strict=True))
    return a, b, c


def _colour(colour: Colour) -> np.ndarray:
    return np.array(colour)[:, None, None]
