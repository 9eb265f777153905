"""The sparse Johnson-Lindenstrauss transform: every scalar added to a few buckets."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from dmin.runtime.errors import DminError
from dmin.sketches.base import Accumulator, FormedSketch
from dmin.sketches.hashing import hash_words, key, signs


class SJLT(FormedSketch):
    """s independent sign-and-fold maps to k/s buckets each, interleaved.

    ``(S g)[s·b + r] = s^-½ Σ_j σ_rj g_j [ h_rj mod (k/s) = b ]``, r = 0 … s−1, with independent
    signs σ and hashes h for each scalar (Kane & Nelson, "Sparser Johnson-Lindenstrauss transforms",
    arXiv 1012.1577, the block construction; used by GraSS, Hu et al., arXiv 2505.18976).

    Each map has ``Var ≤ (‖g‖²‖h‖² + ⟨g, h⟩²) s/k``, and the estimate is the mean of s independent
    ones, so ``Var⟨S g, S h⟩ ≤ (‖g‖²‖h‖² + ⟨g, h⟩²) / k`` for any s. A larger s makes large errors
    rarer but the variance no smaller, and takes s times the work.

    Args:
        dim: k, a multiple of s.
        seed: key of hashes and signs.
        nonzeros: s, the number of buckets of each scalar.
    """

    family = "sjlt"

    def __init__(self, dim: int = 4096, seed: int = 0, nonzeros: int = 4) -> None:
        super().__init__(dim, seed)
        if nonzeros < 1 or dim % nonzeros:
            raise DminError(
                f"sketch.nonzeros={nonzeros} with sketch.dim={dim}: every scalar has one bucket in "
                f"each of that many equal parts, so it must divide sketch.dim. 1, 2 and 4 are "
                f"usual."
            )
        self.nonzeros = nonzeros
        self.folds: int | None = (
            nonzeros  # (s·(h mod k/s) + r) mod k' = s·(h mod k'/s) + r where s | k' | k
        )

    def describe(self) -> dict[str, Any]:
        """Return the settings that define the map."""
        return {**super().describe(), "nonzeros": self.nonzeros}

    def projection(self, name: str, state: Accumulator) -> Callable[[Tensor, Tensor], None]:
        """Return the map of one parameter, hashed anew at each call."""
        device = state.values.device
        size, s = prod(self.parameters.by_name[name].shape), self.nonzeros
        folds: list[tuple[Tensor, Tensor]] = []
        for r in range(s):
            hashed = hash_words(key(self.seed, name, f"offset {r}"), size, device)
            sign = signs(key(self.seed, name, f"sign {r}"), size, device)
            bucket = (hashed % (self.dim // s)).mul_(s).add_(r).to(torch.int32)
            folds.append((bucket, sign.to(torch.int8)))

        def project(gradient: Tensor, rows: Tensor) -> None:
            gradient *= s**-0.5
            for bucket, sign in folds:
                state.backend.scatter(gradient, bucket, sign, rows)

        return project
