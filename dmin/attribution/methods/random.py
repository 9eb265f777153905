"""Chance."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, Requires
from dmin.attribution.method import Method


class Random(Method):
    """A score drawn for each pair of ids, uniform on [0, 1): what knowing nothing achieves.

    Args:
        seed: key of the draw.
    """

    name = "random"
    requires = Requires(readouts=())

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, queries: ExampleBlock, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``, the same for a pair of ids however the examples are cut."""
        return torch.tensor([[self._draw(q, i) for i in train.ids] for q in queries.ids])

    def _draw(self, query: str, example: str) -> float:
        digest = hashlib.blake2b(f"{self.seed}\0{query}\0{example}".encode(), digest_size=3)
        return int.from_bytes(digest.digest(), "little") / 2**24
