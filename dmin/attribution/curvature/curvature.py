"""Curvature in sketch space: ``C = ΦᵀΦ/n`` as low rank plus a scalar, streamed over a store.

C is the empirical Fisher matrix seen through the sketch, so ``(C + λ)^{−p} v`` stands in for a
damped inverse-Hessian-vector product and costs two thin matrix products.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dmin.runtime.errors import DminError

Stream = Callable[[], Iterable[Tensor]]
"""Starts a pass over the rows: blocks ``[n, B, m]``, always the same rows in the same order."""

# Eigenvalues below this share of the largest are rounding: they are taken for zero.
ROUNDING = 1e-12
MEMORY, PASSES = 1 << 30, 2  # bytes that fitting may take; passes where they do not hold all of C
CHUNK = 64  # directions, or thousands of columns, that are widened to float64 at a time


@dataclass(frozen=True)
class Curvature:
    """B matrices ``C_b ≈ V_bᵀ diag(values_b) V_b + rest_b (I − V_bᵀ V_b)``, m × m each.

    Attributes:
        values: float64 ``[B, r]``, leading eigenvalues, descending.
        vectors: float32 ``[B, r, m]``, their orthonormal eigenvectors.
        rest: float64 ``[B]``, the value used for all other eigenvalues: their mean.
        trace: float64 ``[B]``, of C, exact.
        support: min(n, m), how many eigenvalues can differ from zero.
    """

    values: Tensor
    vectors: Tensor
    rest: Tensor
    trace: Tensor
    support: int

    @property
    def mean_eigenvalue(self) -> Tensor:
        """The mean over the support, ``[B]``: independent of the sketch's size."""
        return self.trace / self.support

    @property
    def kept(self) -> Tensor:
        """Share of the energy (the trace) in the eigenvectors kept, ``[B]``."""
        return self.values.sum(1) / self.trace.clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def nbytes(self) -> int:
        """Bytes of memory, nearly all for the eigenvectors."""
        return self.values.nbytes + self.vectors.nbytes

    def effective_dimension(self, damping: Tensor) -> Tensor:
        """Return ``tr C (C + λ)^{−1}``, the number of directions that are not damped away.

        Args:
            damping: λ, ``[B]``.

        Returns:
            float64 ``[B]``.
        """
        rest = (self.support - self.values.shape[1]) * self.rest / (self.rest + damping)
        return (self.values / (self.values + damping[:, None])).sum(1) + rest

    def damping_for(self, dimension: float) -> Tensor:
        """Return the λ of a given :meth:`effective_dimension`, by bisection of log λ.

        Args:
            dimension: the value; at most half of the directions with any energy.

        Returns:
            float64 ``[B]``; 1 where there is no energy at all.
        """
        others = (self.support - self.values.shape[1]) * (self.rest > 0)
        wanted = ((self.values > 0).sum(1) + others).double().div(2).clamp(max=dimension)
        # Σ s/(s + λ) ≤ Σ s/λ bounds λ from above, and the least eigenvalue bounds it from below.
        positive = torch.where(self.values > 0, self.values, math.inf).amin(1)
        low = torch.minimum(positive, torch.where(self.rest > 0, self.rest, math.inf)).log()
        high = (self.trace / wanted).log()
        for _ in range(64):
            middle = (low + high) / 2
            more = self.effective_dimension(middle.exp()) > wanted
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        return torch.where(self.trace > 0, ((low + high) / 2).exp(), 1.0)

    def coordinates(self, rows: Tensor) -> Tensor:
        """Return rows ``[n, B, m]`` along the eigenvectors, float64 ``[n, B, r]``."""
        out = rows.new_empty(*rows.shape[:2], self.values.shape[1], dtype=torch.float64)
        for b, vectors in enumerate(self.vectors):
            x, parts = rows[:, b].double(), out[:, b].split(CHUNK, 1)
            for part, v in zip(parts, vectors.split(CHUNK), strict=True):
                torch.mm(x, v.double().T, out=part)
        return out

    def power(
        self, rows: Tensor, damping: Tensor, p: float, coordinates: Tensor | None = None
    ) -> Tensor:
        """Return ``(C_b + λ_b)^{−p} v`` of each row, computed in float64.

        Args:
            rows: ``[n, B, m]``.
            damping: λ, ``[B]``.
            p: any real number; −1 with λ = 0 is the product with C itself.
            coordinates: of these rows, if known, which saves half of the work.

        Returns:
            ``[n, B, m]``, of the dtype of the rows.

        Raises:
            DminError: a negative power of zero: λ and the rest are both 0.
        """
        leading, other = self._factors(damping, p)
        out = torch.empty_like(rows)
        along = self.coordinates(rows) if coordinates is None else coordinates
        for b, vectors in enumerate(self.vectors):
            found = other[b] * rows[:, b].double()
            scaled = along[:, b] * (leading[b] - other[b])
            for part, v in zip(scaled.split(CHUNK, 1), vectors.split(CHUNK), strict=True):
                found.addmm_(part, v.double())
            out[:, b] = found
        return out

    def quadratic(self, rows: Tensor, damping: Tensor, p: float) -> Tensor:
        """Return ``vᵀ (C_b + λ_b)^{−p} v`` of each row, float64 ``[n, B]``; see :meth:`power`."""
        leading, other = self._factors(damping, p)
        out = rows.new_empty(rows.shape[:2], dtype=torch.float64)
        for b, vectors in enumerate(self.vectors):
            x = rows[:, b].double()
            out[:, b] = other[b] * x.square().sum(1)
            for v, factor in zip(vectors.split(CHUNK), leading[b].split(CHUNK), strict=True):
                out[:, b] += (x @ v.double().T).square() @ (factor - other[b])
        return out

    def describe(self, damping: Tensor) -> str:
        """Return rank, energy kept, effective dimension and damping in words."""
        kept = _span(self.kept, ".1%")
        dimension = _span(self.effective_dimension(damping), ".1f")
        tiny = torch.finfo(torch.float64).tiny
        alpha = _span(damping / self.mean_eigenvalue.clamp(min=tiny), ".3g")
        return (
            f"{self.values.shape[1]} of {self.support} directions keep {kept} of the energy; "
            f"effective dimension {dimension} at a damping of {alpha} mean eigenvalues"
        )

    def _factors(self, damping: Tensor, p: float) -> tuple[Tensor, Tensor]:
        if p > 0 and bool((self.rest + damping <= 0).any()):
            raise DminError(
                f"method.p={p:g} inverts a curvature that is zero in some directions. Give a "
                f"positive damping (method.alpha)."
            )
        return (self.values + damping[:, None]) ** -p, (self.rest + damping) ** -p


def fit_curvature(
    stream: Stream,
    shape: tuple[int, int, int],
    rank: int | None = None,
    memory: int = MEMORY,
    passes: int = PASSES,
    seed: int = 0,
) -> Curvature:
    """Eigendecompose ``C_b = (1/n) Σ_i φ_ib φ_ibᵀ`` for B kinds of rows at once.

    Exact while it fits into memory: from C if n > m, in one pass; else from its dual, the inner
    products of the rows. Otherwise a randomised Nyström approximation with as many directions as
    fit (Tropp et al. 2017, "Fixed-rank approximation of a positive-semidefinite matrix from
    streaming data"); more than one pass is subspace iteration, needed for flat spectra.

    Args:
        stream: starts a pass over the rows.
        shape: (n, B, m) of all rows together.
        rank: directions kept at most; None for all.
        memory: bytes that fitting may take, besides the blocks of the stream.
        passes: over the rows, of the randomised approximation.
        seed: key of the random basis.

    Raises:
        DminError: rank, memory or passes is out of range.
    """
    n, count, m = shape
    support = min(n, m)
    if passes < 1 or (rank is not None and rank < 1):
        raise DminError(f"rank={rank}, passes={passes}: both must be at least 1 (rank or null).")
    kept = support if rank is None else min(rank, support)
    copied = kept if kept < n else 0  # what is left of the rows, while they still stand
    if n <= m and 4 * count * (n + copied) * m + 24 * n * n <= memory:
        parts = _dual(stream, shape)
    elif m < n and 8 * (count + 4) * m * m <= memory:
        parts = _primal(stream, shape)
    else:
        unit = 8 * m * (2 * count + 4)  # two bases, and what one factorisation needs
        if memory < unit:
            raise DminError(
                f"method.memory={memory} bytes are too few for one direction of {count} × {m} "
                f"numbers. Give at least {unit}."
            )
        size = min(memory // unit, support if rank is None else rank + 10 + rank // 5)
        parts = _nystrom(stream, shape, size, passes, seed)
        kept = min(kept, size)
    values, vectors, trace = parts
    if kept < vectors.shape[1]:
        values, vectors = values[:, :kept], vectors[:, :kept].clone()
    values = torch.where(values > ROUNDING * values[:, :1], values, 0)
    rest = (trace - values.sum(1)).clamp(min=0) / max(1, support - kept)
    return Curvature(values, vectors, rest if kept < support else 0 * rest, trace, support)


def _span(values: Tensor, form: str) -> str:
    """Describe the smallest and the largest value, once if they read the same."""
    least, most = f"{float(values.min()):{form}}", f"{float(values.max()):{form}}"
    return least if least == most else f"{least} to {most}"


Parts = tuple[Tensor, Tensor, Tensor]  # values [B, r], vectors [B, r, m], trace [B]


def _dual(stream: Stream, shape: tuple[int, int, int]) -> Parts:
    """From the n × n inner products: ``V = U Φ / √(nλ)``; all rows are in memory."""
    n, count, m = shape
    rows = torch.empty(count, n, m)
    start = 0
    for block in stream():
        rows[:, start : start + len(block)] = block.transpose(0, 1)
        start += len(block)
    values = torch.empty(count, n, dtype=torch.float64)
    for b in range(count):
        pieces = rows[b].split(16 * CHUNK, 1)
        gram = torch.zeros(n, n, dtype=torch.float64)
        for piece in pieces:
            x = piece.double()
            gram.addmm_(x, x.T)
        found, u = torch.linalg.eigh(gram / n)
        found, u = found.flip(0).clamp(min=0), u.flip(1)
        # A direction of rounding is dropped whole: normalising it would make up a vector.
        used = found > ROUNDING * found[0]
        turn = torch.where(used, (n * found).rsqrt(), 0)[:, None] * u.T
        for piece in pieces:  # in place, which each column allows
            piece.copy_(turn @ piece.double())
        values[b] = found
    return values, rows, values.sum(1)


def _primal(stream: Stream, shape: tuple[int, int, int]) -> Parts:
    """From the m × m matrix itself."""
    n, count, m = shape
    total = [torch.zeros(m, m, dtype=torch.float64) for _ in range(count)]
    for block in stream():
        for b in range(count):
            x = block[:, b].double()
            total[b].addmm_(x.T, x)
    values, vectors, trace = [], [], []
    while total:  # each makes room for its eigenvectors
        matrix = total.pop(0) / n
        found, v = torch.linalg.eigh(matrix)
        trace.append(matrix.trace())
        values.append(found.flip(0).clamp(min=0))
        vectors.append(v.flip(1).T.float())
    return torch.stack(values), torch.stack(vectors), torch.stack(trace)


def _nystrom(
    stream: Stream, shape: tuple[int, int, int], size: int, passes: int, seed: int
) -> Parts:
    """From ``C Q`` for a basis Q of the leading directions: ``C ≈ (CQ)(QᵀCQ)⁺(CQ)ᵀ``."""
    n, count, m = shape
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(m, size, generator=generator, dtype=torch.float64)
    basis = [torch.linalg.qr(start)[0]] * count
    for number in range(passes):
        image = [torch.zeros(m, size, dtype=torch.float64) for _ in range(count)]
        trace = torch.zeros(count, dtype=torch.float64)
        for block in stream():
            for b in range(count):
                x = block[:, b].double()
                image[b].addmm_(x.T, x @ basis[b], alpha=1 / n)
                trace[b] += x.square().sum() / n
        if number < passes - 1:
            basis = []
            while image:
                basis.append(torch.linalg.qr(image.pop(0))[0])
    cores = [one.T @ other for one, other in zip(basis, image, strict=True)]
    del basis, start
    values = torch.empty(count, size, dtype=torch.float64)
    vectors = torch.empty(count, size, m)
    for b, core in enumerate(cores):
        found, u = torch.linalg.eigh((core + core.T) / 2)
        used = found > ROUNDING * found[-1]
        inverse_root = torch.where(used, found.abs().rsqrt(), 0)
        left, triangle = torch.linalg.qr(image.pop(0) @ (u * inverse_root))
        turn, singular, _ = torch.linalg.svd(triangle)
        values[b] = singular.square()
        vectors[b] = (left @ turn).T
    return values, vectors, trace
