"""What methods with a damped curvature share: its settings, its fit, its damping."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.base import ExampleBlock, Method, Side
from dmin.attribution.curvature import Curvature, fit_curvature
from dmin.errors import DminError

log = logging.getLogger(__name__)


class Damped(Method):
    """A method with a curvature C and a damping ``λ = α · mean eigenvalue of C``.

    Args:
        alpha: α, the damping, in units of the mean eigenvalue over C's support.
        rank: directions of the curvature kept at most; None for all that fit the memory.
        memory: bytes that fitting may take.
        passes: over the store, where the curvature does not fit the memory.

    Raises:
        DminError: α is not positive.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        rank: int | None = None,
        memory: int = 1 << 30,
        passes: int = 2,
    ) -> None:
        self.alpha = checked_alpha(alpha)
        self.rank, self.memory, self.passes = rank, memory, passes
        self._curvature: Curvature | None = None

    @property
    def curvature(self) -> Curvature:
        """What :meth:`fit` found."""
        if self._curvature is None:
            raise RuntimeError("call method.fit(train) first")
        return self._curvature

    @property
    def damping(self) -> Tensor:
        """λ, float64 ``[B]``."""
        mean = self.curvature.mean_eigenvalue
        # Where there is no gradient at all there is nothing to precondition: any λ will do.
        return torch.where(mean > 0, self.alpha * mean, 1)

    def fit_to(
        self, train: Side, rows: Callable[[ExampleBlock], Tensor], shape: tuple[int, int, int]
    ) -> None:
        """Fit the curvature to the training rows, and log what it is like.

        Args:
            train: the training side.
            rows: makes ``[n, B, m]`` of a block.
            shape: of all rows together.
        """
        # A block stands there several times over: as it is read, arranged, and widened.
        row = 4 * int(np.prod(train.store.layout.row_shape))
        size = min(256, max(1, self.memory // (32 * row)))
        self._curvature = fit_curvature(
            lambda: (rows(block) for block in train.blocks(self.requires, size)),
            shape,
            self.rank,
            self.memory,
            self.passes,
        )
        log.info("%s: curvature: %s", self.name, self._curvature.describe(self.damping))

    def notes(self) -> dict[str, str]:
        """Return rank, energy kept and effective dimension of the curvature."""
        return {"curvature": self.curvature.describe(self.damping)}


def checked_alpha(alpha: float) -> float:
    """Return a damping that can be one, or raise DminError."""
    if not 0 < alpha < math.inf:
        raise DminError(
            f"method.alpha={alpha}: give a positive damping, in units of the mean eigenvalue; "
            f"0.01 to 10 is usual."
        )
    return float(alpha)
