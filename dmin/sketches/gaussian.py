"""A dense Gaussian matrix: the reference for the other sketches, if it fits into memory."""

from collections.abc import Callable
from math import prod
from typing import Self

import torch
from torch import Tensor

from dmin.gradients.parameters import Parameters
from dmin.runtime.errors import DminError
from dmin.sketches.base import Accumulator, FormedSketch
from dmin.sketches.hashing import key


class Gaussian(FormedSketch):
    """Independent normal entries of variance 1/k, the classical random projection.

    ``(S g)[c] = k^-½ Σ_j z_cj g_j``, z ~ N(0, 1);
    ``Var⟨S g, S h⟩ = (‖g‖²‖h‖² + ⟨g, h⟩²) / k`` exactly, for every pair of vectors
    (Johnson & Lindenstrauss 1984; TRAK's projection, Park et al., arXiv 2303.14186).

    The matrix takes ``4 k P`` bytes, and multiplying a gradient with it ``2 k P`` operations. It is
    the reference for small models, and impractical for large ones.

    Args:
        dim: k.
        seed: key of the entries; those of a parameter are drawn on the CPU, keyed by its name.
        max_bytes: the largest matrix that is accepted.
    """

    family = "gaussian"

    def __init__(self, dim: int = 4096, seed: int = 0, max_bytes: int = 4 << 30) -> None:
        super().__init__(dim, seed)
        self.max_bytes = max_bytes

    def bind(self, parameters: Parameters) -> Self:
        """Return this sketch for the parameters of one model; the matrix is drawn on first use.

        Raises:
            DminError: the matrix would take more than ``max_bytes``.
        """
        size = 4 * self.dim * parameters.count
        if size > self.max_bytes:
            raise DminError(
                f"sketch=gaussian would keep a matrix of {self.dim} × {parameters.count:,} "
                f"numbers, {size:,} bytes, more than sketch.max_bytes={self.max_bytes:,}. "
                f"Choose sketch=block_cyclic, of the same error bound and without a matrix, a "
                f"smaller sketch.dim, or fewer parameters (collect.params)."
            )
        return super().bind(parameters)

    def projection(self, name: str, state: Accumulator) -> Callable[[Tensor, Tensor], None]:
        """Return the product with a parameter's part of the matrix."""
        if name not in self._kept:  # float32 [P, k]
            generator = torch.Generator().manual_seed(key(self.seed, name, "gaussian"))
            size = prod(self.parameters.by_name[name].shape)
            drawn = torch.randn(size, self.dim, generator=generator).mul_(self.dim**-0.5)
            self._kept[name] = drawn.to(state.values.device)
        matrix = self._kept[name].to(state.values.dtype)

        def project(gradient: Tensor, rows: Tensor) -> None:
            rows.addmm_(gradient, matrix)

        return project
