"""Base class of methods with a damped curvature: its settings, its fit, its damping."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.curvature.curvature import MEMORY, PASSES, Curvature, fit_curvature
from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.method import Method
from dmin.runtime.errors import DminError

log: logging.Logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class DampedCurvatureMethod(Method):
    """A method with a curvature C and a damping λ, given in one of two ways.

    ``λ = α · mean eigenvalue of C``, or λ such that ``tr C (C + λ)^{−1} = d``, the effective
    dimension: the number of directions of C above the damping. A good α for one model is
    far too large or too small for another with a different spectrum; d transfers
    (experiments/sharp_energy).

    Args:
        alpha: α, in units of the mean eigenvalue over C's support; None to give d instead.
        rank: directions of the curvature kept at most; None for all that fit the memory.
        memory: bytes that fitting may take.
        passes: over the store, if the curvature does not fit into memory.
        effective: d, of each timestep's curvature; at most half of
            all directions. None to give α instead.

    Raises:
        DminError: neither or both of α and d are given, or the value is not positive.
    """

    alpha: float | None = 0.1
    _: KW_ONLY
    rank: int | None = None
    memory: int = MEMORY
    passes: int = PASSES
    effective: float | None = None

    def __post_init__(self) -> None:
        """Check the damping."""
        require_damping(self.alpha, self.effective)
        self._curvature: Curvature | None = None
        self.known: dict[tuple[str, ...], Tensor] | None = None

    @property
    def curvature(self) -> Curvature:
        """The curvature fitted by :meth:`fit`."""
        if self._curvature is None:
            raise RuntimeError("call method.fit(train) first")
        return self._curvature

    @property
    def damping(self) -> Tensor:
        """λ, float64 ``[B]``."""
        if self.effective is not None:
            return self.curvature.damping_for(self.effective)
        assert self.alpha is not None
        mean = self.curvature.mean_eigenvalue
        # Where there is no gradient at all there is nothing to precondition: any λ will do.
        return torch.where(mean > 0, self.alpha * mean, 1)

    @property
    def mean_alpha(self) -> float:
        """The damping in units of the mean eigenvalue: α if given, else the mean over log λ."""
        mean = self.curvature.mean_eigenvalue
        return float((self.damping / mean)[mean > 0].log().mean().exp())

    def fit_to(
        self,
        train: FeatureSet,
        rows: Callable[[ExampleBlock], Tensor],
        shape: tuple[int, int, int],
        what: str,
    ) -> None:
        """Fit the curvature to the training rows, and log a description.

        Args:
            train: the training examples; they cache the fit for other methods of the same rows.
            rows: makes ``[n, B, m]`` of a block.
            shape: of all rows together.
            what: a name for these rows of this method's readouts.
        """
        # A block stands there several times over: as it is read, arranged, and widened.
        row = 4 * int(np.prod(train.store.layout.row_shape))
        size = min(256, max(1, self.memory // (32 * row)))
        settings = self.rank, self.memory, self.passes

        # C = Σ_i r_i φ_i φ_iᵀ / Σ_i r_i, of examples that an epoch passed r_i times.
        scale = math.sqrt(len(train) / train.total)

        def stream() -> Iterator[Tensor]:
            blocks = train.blocks(self.requires, size)
            return (scale * train.counted(rows(block), block, root=True) for block in blocks)

        key = what, *self.requires.readouts, *settings
        self._curvature = train.fits.get(key, lambda: fit_curvature(stream, shape, *settings))
        log.info("%s: curvature: %s", self.name, self._curvature.describe(self.damping))

    def power(self, rows: Tensor, p: float, ids: Sequence[str]) -> Tensor:
        """Return ``(C + λ)^{−p} v`` of each row of some queries, ``[n, B, m]``.

        ``known`` caches their coordinates, by id, when several λ and p are tried.
        """
        if self.known is None:
            return self.curvature.power(rows, self.damping, p)
        key = tuple(ids)
        if key not in self.known:
            self.known[key] = self.curvature.coordinates(rows)
        return self.curvature.power(rows, self.damping, p, self.known[key])

    def notes(self) -> dict[str, str]:
        """Return rank, energy kept and effective dimension of the curvature, and the damping."""
        return {"curvature": self.curvature.describe(self.damping)}


def require_damping(alpha: float | None, effective: float | None) -> None:
    """Raise DminError unless exactly one of the two sets the damping."""
    if (alpha is None) == (effective is None):
        raise DminError(
            f"method.alpha={alpha}, method.effective={effective}: exactly one of the two sets "
            f"the damping. Give one, and null for the other."
        )
    if alpha is not None and not 0 < alpha < math.inf:
        raise DminError(
            f"method.alpha={alpha}: give a positive damping, in units of the mean eigenvalue; "
            f"0.01 to 10 is usual."
        )
    if effective is not None and not 0 < effective < math.inf:
        raise DminError(
            f"method.effective={effective}: give a positive effective dimension; 2 to 32 is usual."
        )
