"""Baselines that look at the images alone. A method that does not beat them shows mere likeness."""

from __future__ import annotations

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, Requires
from dmin.attribution.method import Method


class PixelL2(Method):
    """Minus the squared distance of the pixels, ``−‖x_q − x_i‖²``."""

    name = "pixel_l2"
    requires = Requires(readouts=(), images=True)

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return the pixels of the queries, ``[Q, C·H·W]``."""
        assert queries.images is not None
        return queries.images.flatten(1)

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        assert train.images is not None
        # Differences one by one: ‖x‖² + ‖y‖² − 2x·y would not give a duplicate exactly zero.
        distance = torch.cdist(
            queries, train.images.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
        )
        return -distance.square()


class PixelCosine(Method):
    """Cosine of the pixels, ``cos(x_q, x_i)``."""

    name = "pixel_cosine"
    requires = Requires(readouts=(), images=True)

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return unit pixels of the queries, ``[Q, C·H·W]``."""
        assert queries.images is not None
        return torch.nn.functional.normalize(queries.images.flatten(1), dim=1)

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        assert train.images is not None
        return queries @ torch.nn.functional.normalize(train.images.flatten(1), dim=1).T
