"""Keyed noise: the same in every process, on every device and after every restart."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dmin.runtime.errors import DminError


class Noise(ABC):
    """Standard normal noise that depends only on its key.

    Args:
        seed: part of the key. Stores are comparable only if they have the same seed.
        draws: draws per timestep; the store keeps each separately.
        antithetic: draw 2j+1 is minus draw 2j. Terms odd in the noise then cancel in the sum over
            a pair (Hammersley & Morton 1956), but only half of the draws are independent.

    Raises:
        DminError: ``draws`` is below 1, or odd with ``antithetic``.
    """

    kind: str
    per_example = False
    """Whether the key contains the example id; if not, all examples and queries share the noise."""
    shapes: str = "own"
    """What examples of different shapes share; see :class:`SharedNoise`."""

    def __init__(self, seed: int = 0, draws: int = 1, antithetic: bool = False) -> None:
        if draws < 1:
            raise DminError(f"noise.draws={draws}: at least one draw of noise is needed.")
        if antithetic and draws % 2:
            raise DminError(
                f"noise.draws={draws} with noise.antithetic=true: antithetic draws come in pairs. "
                f"Set noise.draws={draws + 1}."
            )
        self.seed = seed
        self.draws = draws
        self.antithetic = antithetic

    def __call__(
        self, shape: Sequence[int], timestep: float, draw: int = 0, example: str = ""
    ) -> Tensor:
        """Return the noise of one example at one timestep and draw.

        Args:
            shape: shape of one example in the model's space (pixels or latents), ``[C, H, W]``.
            timestep: in the model's unit.
            draw: 0 … draws−1.
            example: the example's id; shared noise ignores it.

        Returns:
            float32 of that shape, drawn on the CPU so that it is the same for every device.
        """
        sign = -1 if self.antithetic and draw % 2 else 1
        text = self._key(float(timestep), draw - (sign < 0), example)
        return sign * self._drawn(tuple(shape), text)

    def _drawn(self, shape: tuple[int, ...], text: str) -> Tensor:
        """Return the numbers for the key ``text``."""
        return normal(shape, text)

    @abstractmethod
    def _key(self, timestep: float, draw: int, example: str) -> str:
        """Return the key as a text."""

    def describe(self) -> dict[str, Any]:
        """Return the settings that define the noise, as JSON: a part of the feature fingerprint."""
        pairs = {"antithetic": True} if self.antithetic else {}
        return {"kind": self.kind, "seed": self.seed, "draws": self.draws, **pairs}


class SharedNoise(Noise):
    """The same noise for all examples and queries, one tensor per timestep and draw.

    Shared noise makes gradients comparable: with separate noise for each example, even an exact
    duplicate has a cosine of only .2 to .5 to its source.

    Args:
        seed: part of the key.
        draws: draws per timestep.
        antithetic: draw 2j+1 is minus draw 2j.
        shapes: what examples of different shapes share. ``one``: only one shape is allowed.
            ``field``: one infinite field of noise; each shape takes the part around the origin, so
            that all shapes have the same noise at the same position. ``own``: each shape has
            different noise, and scores between shapes mean little.
    """

    kind = "shared"

    def __init__(
        self,
        seed: int = 0,
        draws: int = 1,
        antithetic: bool = False,
        shapes: Literal["one", "field", "own"] = "one",
    ) -> None:
        super().__init__(seed, draws, antithetic)
        if shapes not in ("one", "field", "own"):
            raise DminError(f"noise.shapes={shapes!r}: choose one of one, field, own.")
        self.shapes = shapes

    def describe(self) -> dict[str, Any]:
        """Return the settings that define the noise; ``one`` and ``own`` are described alike."""
        field = {"shapes": "field"} if self.shapes == "field" else {}
        return {**super().describe(), **field}

    def _drawn(self, shape: tuple[int, ...], text: str) -> Tensor:
        return field(shape, text) if self.shapes == "field" else normal(shape, text)

    def _key(self, timestep: float, draw: int, example: str) -> str:
        return f"noise {self.seed} {timestep!r} {draw}"


class PerExampleNoise(Noise):
    """Separate noise for each example, keyed by its id, as other attribution methods draw it.

    For comparison with those methods. A query has another id than the examples that it resembles,
    so its noise differs from theirs. More draws recover part of the loss against
    :class:`SharedNoise`.
    """

    kind = "per_example"
    per_example = True

    def _key(self, timestep: float, draw: int, example: str) -> str:
        return f"noise {self.seed} {timestep!r} {draw} of {example}"


TILE = 64  # a field of noise is drawn in tiles of this height and width


def normal(shape: tuple[int, ...], text: str) -> Tensor:
    """Return standard normal numbers for the key ``text``, on the CPU."""
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(key)
    # An explicit dtype: with another default dtype, the same generator draws other numbers.
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def field(shape: tuple[int, ...], text: str) -> Tensor:
    """Return the part of an infinite field of noise that is centred on the origin.

    Args:
        shape: ``[C, H, W]``, or ``[C, frames, H, W]``. The first frame has the noise of an image
            of that size; each other frame has a separate field.
        text: the key.

    Raises:
        DminError: the shape has neither three nor four axes.
    """
    if len(shape) == 4:
        channels, frames, *sides = shape
        texts = [text, *(f"{text} frame {n}" for n in range(1, frames))]
        return torch.stack([field((channels, *sides), each) for each in texts], 1)
    if len(shape) != 3:
        raise DminError(
            f"noise.shapes=field needs tensors with channels, height and width; this model noises "
            f"{list(shape)}. Set noise.shapes=one."
        )
    channels, height, width = shape
    top, left = height // 2, width // 2
    tiles = [
        [
            normal((channels, TILE, TILE), f"{text} tile {i} {j}")
            for j in range(-left // TILE, -((left - width) // TILE))
        ]
        for i in range(-top // TILE, -((top - height) // TILE))
    ]
    drawn = torch.cat([torch.cat(row, 2) for row in tiles], 1)
    return drawn[:, -top % TILE :, -left % TILE :][:, :height, :width].contiguous()
