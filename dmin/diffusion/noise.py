"""Keyed noise: the same in every process, on every device and after every restart."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dmin.runtime.errors import DminError


class Noise(ABC):
    """Standard normal noise that depends on its key and on nothing else.

    Args:
        seed: part of the key. Stores are comparable only when made with the same one.
        draws: draws per timestep, kept apart in the store.
        antithetic: draw 2j+1 is minus draw 2j. What is odd in the noise then cancels in the sum
            over a pair (Hammersley & Morton 1956), at the price of half as many free draws.

    Raises:
        DminError: no draws, or an odd number of antithetic ones.
    """

    kind: str
    per_example = False
    """Whether the key has the example in it; if not, all examples and queries see one noise."""
    shapes: str = "own"
    """What examples of several shapes share: see :class:`SharedNoise`."""

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
            shape: of one example in the space the model diffuses, ``[C, H, W]``.
            timestep: in the model's own unit.
            draw: 0 … draws−1.
            example: its id; noise that is shared looks away.

        Returns:
            float32 of that shape on the CPU, where it is drawn so that every device sees the same.
        """
        sign = -1 if self.antithetic and draw % 2 else 1
        text = self._key(float(timestep), draw - (sign < 0), example)
        return sign * self._drawn(tuple(shape), text)

    def _drawn(self, shape: tuple[int, ...], text: str) -> Tensor:
        """Return the numbers that a text decides."""
        return normal(shape, text)

    @abstractmethod
    def _key(self, timestep: float, draw: int, example: str) -> str:
        """Return the text that decides the numbers."""

    def describe(self) -> dict[str, Any]:
        """Return the settings that define the noise, as JSON: a part of the feature fingerprint."""
        pairs = {"antithetic": True} if self.antithetic else {}
        return {"kind": self.kind, "seed": self.seed, "draws": self.draws, **pairs}


class SharedNoise(Noise):
    """One noise a timestep and draw, for all examples and queries.

    Sharing is what makes gradients comparable: with noise drawn for each example even an exact
    duplicate has a cosine of .2 to .5 to its source.

    Args:
        seed: part of the key.
        draws: draws per timestep.
        antithetic: draw 2j+1 is minus draw 2j.
        shapes: what examples of several shapes share. ``one``: there is one shape, and a second is
            refused. ``field``: one field of noise without end, of which each shape is the part
            around the origin, so that all have the same noise at the same place. ``own``: each
            shape has other numbers, and scores across shapes are of little worth.
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
        """Return the settings that define the noise; one shape has the same whatever is said."""
        field = {"shapes": "field"} if self.shapes == "field" else {}
        return {**super().describe(), **field}

    def _drawn(self, shape: tuple[int, ...], text: str) -> Tensor:
        return field(shape, text) if self.shapes == "field" else normal(shape, text)

    def _key(self, timestep: float, draw: int, example: str) -> str:
        return f"noise {self.seed} {timestep!r} {draw}"


class PerExampleNoise(Noise):
    """Noise of each example's own, keyed by its id, as other attribution methods draw it.

    To compare with those; several draws make up for some of what is lost against
    :class:`SharedNoise`. A query has another id than the examples it resembles, so its noise
    differs from theirs.
    """

    kind = "per_example"
    per_example = True

    def _key(self, timestep: float, draw: int, example: str) -> str:
        return f"noise {self.seed} {timestep!r} {draw} of {example}"


TILE = 64  # side of the tiles that a field of noise is drawn in


def normal(shape: tuple[int, ...], text: str) -> Tensor:
    """Return standard normal numbers that a text decides, on the CPU."""
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(key)
    # Not of the default dtype: in another one, the same generator draws other numbers.
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def field(shape: tuple[int, ...], text: str) -> Tensor:
    """Return the part around the origin of a field of noise: the middle of a shape lies there.

    Args:
        shape: channels, height and width; or channels, frames, height and width. The first frame
            sees what an image does, each other one a field of its own.
        text: that decides the numbers.

    Raises:
        DminError: another shape.
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
