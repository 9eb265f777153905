"""Examples × (timestep, draw): the inputs of a pass, assembled in this one place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmin.diffusion.noise import Noise
from dmin.runtime.errors import DminError
from dmin.runtime.transfer import to_device

SHARED = "shared."
"""Name prefix of conditions without an example axis: every example uses the whole tensor."""


def chosen_rows(condition: Mapping[str, Tensor], rows: slice | Tensor) -> dict[str, Tensor]:
    """Return the conditions of some examples; shared conditions are returned whole."""
    return {k: v if k.startswith(SHARED) else v[rows] for k, v in condition.items()}


class NoisedBatch(NamedTuple):
    """Inputs of ``model.predict``: one row per pair of an example and a point (timestep, draw)."""

    x0: Tensor  # [pairs, ...]
    noise: Tensor  # shape of x0
    t: Tensor  # [pairs]
    condition: Mapping[str, Tensor]  # each [pairs, ...], except shared ones

    def rows(self, chosen: slice | Tensor) -> NoisedBatch:
        """Return some pairs, selected by a slice or by positions on the same device."""
        condition = chosen_rows(self.condition, chosen)
        return NoisedBatch(self.x0[chosen], self.noise[chosen], self.t[chosen], condition)

    def split(self, size: int) -> Iterator[NoisedBatch]:
        """Yield consecutive batches of at most ``size`` pairs."""
        for start in range(0, len(self.t), size):
            yield self.rows(slice(start, start + size))


class NoisedExamples:
    """Encoded examples at every point (timestep, draw).

    Pairs are numbered in the order of a store's axes: pair ``(i · D + d) · T + s`` is example i at
    noise draw d of D and timestep s of T.

    Args:
        noise: the source of noise, with D draws.
        timesteps: T timesteps, in the model's unit.
        x0: ``[examples, ...]`` from ``model.encode``, or ``[examples · E, ...]`` with E draws of
            the data per example. Noise draw d then uses data draw d mod E.
        condition: from ``model.encode``, with as many rows as x0.
        ids: ids of the examples.

    Attributes:
        examples: number of examples.
        points: D · T, the number of pairs per example.

    Raises:
        DminError: D is not a multiple of E.
    """

    def __init__(
        self,
        noise: Noise,
        timesteps: Sequence[float],
        x0: Tensor,
        condition: Mapping[str, Tensor],
        ids: Sequence[str],
    ) -> None:
        # Encoders may return other strides, with which kernels round differently.
        self.x0: Tensor = x0.contiguous()
        self.condition: dict[str, Tensor] = {
            name: value.contiguous() for name, value in condition.items()
        }
        points = [(t, draw) for draw in range(noise.draws) for t in timesteps]
        self.points: int = len(points)
        self.examples: int = len(ids)
        self._steps, self._drawn = len(timesteps), len(x0) // len(ids)
        if noise.draws % self._drawn:
            raise DminError(
                f"the data have {self._drawn} draws per example (run.draws, data.draws.number), "
                f"but noise.draws={noise.draws}: set noise.draws={self._drawn}, or a multiple."
            )
        self._own = noise.per_example
        drawn = torch.stack(
            [noise(x0.shape[1:], *p, id) for id in (ids if self._own else [""]) for p in points]
        )
        self._noise = to_device(drawn.to(x0.dtype), x0.device)
        self._t = to_device(torch.tensor([t for t, _ in points]), x0.device)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return self.examples * self.points

    def at(self, pairs: Tensor) -> NoisedBatch:
        """Return the pairs with the given numbers, int64 ``[n]``."""
        pairs = to_device(pairs, self.x0.device)
        point = pairs % self.points
        row = pairs // self.points * self._drawn + point // self._steps % self._drawn
        return NoisedBatch(
            self.x0[row],
            self._noise[pairs if self._own else point],
            self._t[point],
            chosen_rows(self.condition, row),
        )

    def all(self) -> NoisedBatch:
        """Return all pairs."""
        return self.at(torch.arange(len(self)))
