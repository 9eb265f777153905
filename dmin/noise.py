"""Noise keyed by (seed, timestep, draw): the same for every example, query, process and restart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmin.errors import DminError


class SharedNoise:
    """Standard normal noise that all examples and queries share at a timestep.

    Sharing is what makes gradients comparable: with noise drawn for each example even an exact
    duplicate has a cosine of .2 to .5 to its source.

    Args:
        seed: key of the noise. Stores are comparable only when made with the same one.
        draws: independent draws a timestep, kept apart in the store.
    """

    def __init__(self, seed: int = 0, draws: int = 1) -> None:
        if draws < 1:
            raise DminError(f"noise.draws={draws}: at least one draw of noise is needed.")
        self.seed = seed
        self.draws = draws

    def __call__(self, shape: Sequence[int], timestep: float, draw: int = 0) -> Tensor:
        """Return the noise of one timestep and draw.

        Args:
            shape: of one example in the space the model diffuses, ``[C, H, W]``.
            timestep: in the model's own unit.
            draw: 0 … draws−1.

        Returns:
            float32 of that shape on the CPU, where it is drawn so that every device sees the same.
        """
        text = f"noise {self.seed} {float(timestep)!r} {draw}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(key))

    def describe(self) -> dict[str, Any]:
        """Return the settings that define the noise, as JSON: a part of the feature fingerprint."""
        return {"kind": "shared", "seed": self.seed, "draws": self.draws}
