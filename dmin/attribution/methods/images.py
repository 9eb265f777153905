"""Similarity of the images alone: pixels, a Gaussian kernel, SSIM (Wang et al. 2004).

A method that does not beat them measures no more than visual similarity.
"""

from typing import Any

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.method import CosineMethod, Method
from dmin.runtime.errors import DminError


class PixelL2(Method):
    """Minus the squared distance of the pixels, ``−‖x_q − x_i‖²``."""

    name = "pixel_l2"
    requires: Requires = Requires(readouts=(), images=True)

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return the pixels of the queries, ``[Q, C·H·W]``."""
        return _pixels(queries)

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``."""
        return -_squared_distances(queries, train)

    def limit(self, queries: Tensor, sign: int = 1) -> Tensor | None:
        """Return 0, the same pixels; distances have no end."""
        return torch.zeros(len(queries)) if sign > 0 else None


class PixelCosine(CosineMethod):
    """Cosine of the pixels, ``cos(x_q, x_i)``."""

    name = "pixel_cosine"
    requires: Requires = Requires(readouts=(), images=True)

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return unit pixels of the queries, ``[Q, C·H·W]``."""
        return torch.nn.functional.normalize(_pixels(queries), dim=1)


class GaussianKernel(Method):
    """A kernel over whole images, ``exp(−‖x_q − x_i‖² / (2 β² d²))``.

    d² is the mean squared distance between training images, so β means the same in any data. For
    one query it ranks like pixel distance; sums of scores (LDS) differ.

    Args:
        bandwidth: β.

    Raises:
        DminError: β is not positive.
    """

    name = "gaussian_kernel"
    requires: Requires = Requires(readouts=(), images=True)

    def __init__(self, bandwidth: float = 0.3) -> None:
        if not bandwidth > 0:
            raise DminError(f"method.bandwidth={bandwidth}: give a positive number.")
        self.bandwidth = bandwidth

    def fit(self, train: FeatureSet) -> None:
        """Find the mean squared distance of two training images: twice their total variance."""
        total, squared = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for block in train.blocks(self.requires):
            pixels = _pixels(block).double()
            total, squared = total + pixels.sum(0), squared + pixels.square().sum()
        variance = squared / len(train) - (total / len(train)).square().sum()
        # Images that are all alike have no scale; any will do, their distances are zero.
        self._squared_distance = 2 * float(variance) if variance > 1e-12 else 1.0

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return the pixels of the queries, ``[Q, C·H·W]``."""
        return _pixels(queries)

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``, in (0, 1]."""
        scale = 2 * self.bandwidth**2 * self._squared_distance
        return torch.exp(-_squared_distances(queries, train) / scale)

    def limit(self, queries: Tensor, sign: int = 1) -> Tensor:
        """Return 1, the same pixels, or 0."""
        return torch.full((len(queries),), float(sign > 0))


class SSIM(Method):
    """Structural similarity under a Gaussian window (Wang et al. 2004), by torchmetrics.

    Args:
        sigma: of the window in pixels; it spans ``2⌊3.5σ + 0.5⌋ + 1``. The paper's is 1.5.

    Raises:
        DminError: σ is not positive.
    """

    name = "ssim"
    requires: Requires = Requires(readouts=(), images=True)

    def __init__(self, sigma: float = 1.5) -> None:
        if not sigma > 0:
            raise DminError(f"method.sigma={sigma}: give a positive number; 1.5 is usual.")
        self.sigma = sigma

    def transform_query(self, queries: ExampleBlock) -> Tensor:
        """Return the images of the queries, ``[Q, C, H, W]``.

        Raises:
            DminError: they are smaller than half of the window, so the border cannot be mirrored.
        """
        assert queries.images is not None
        reach = int(3.5 * self.sigma + 0.5)
        if min(queries.images.shape[2:]) <= reach:
            raise DminError(
                f"method.sigma={self.sigma:g}: a window of {2 * reach + 1} pixels does not fit "
                f"images of {tuple(queries.images.shape[2:])}. Set it lower, say to 0.5."
            )
        return queries.images

    def score(self, queries: Tensor, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``, at most 1."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        assert train.images is not None
        scores: list[Any] = [
            structural_similarity_index_measure(
                image.expand_as(train.images),
                train.images,
                sigma=self.sigma,
                data_range=1.0,
                reduction="none",
            )
            for image in queries
        ]
        return torch.stack(scores)

    def limit(self, queries: Tensor, sign: int = 1) -> Tensor:
        """Return ±1."""
        return torch.full((len(queries),), float(sign))


def _pixels(block: ExampleBlock) -> Tensor:
    assert block.images is not None
    return block.images.flatten(1)


def _squared_distances(queries: Tensor, train: ExampleBlock) -> Tensor:
    """Return ``‖x_q − x_i‖²``, ``[Q, n]``."""
    # Differences one by one: ‖x‖² + ‖y‖² − 2x·y would not give a duplicate exactly zero.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(queries, _pixels(train), compute_mode=mode).square()
