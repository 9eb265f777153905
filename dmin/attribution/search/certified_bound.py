"""The certified bound: what no score exceeds, from projections of the rows on few directions."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.search.scan import Span, decoded_rows, multiply, row_factors
from dmin.attribution.search.threads import in_threads
from dmin.runtime.errors import DminWarning
from dmin.runtime.kept import Kept, keep, kept, remark
from dmin.store import Store

ROWS = 256  # in one matrix product
SAMPLE = 16_384  # rows that the directions are found on
SPAN = 65_536  # codes of one thread at a time
# ‖z‖² − ‖Vᵀz‖² in float32 is off by less than this part of ‖z‖².
SLACK = 1e-5
ARRAYS = ("directions", "steps", "codes", "roundings", "residuals", "lengths")


@dataclass(frozen=True)
class ProjectionIndex:
    """For every row z (scaled and concatenated over draws, timesteps and groups) a code of Vᵀz.

    V are about the leading eigenvectors of ZᵀZ, found by streamed randomised subspace iteration
    (Halko, Martinsson & Tropp 2011, arXiv 0909.4061) in memory of a few ``m × r`` matrices. How
    near they come decides how much a search reads, never what it finds. Projections are kept as a
    byte a direction; by how much these are off is kept as well.

    Args:
        kind: what it is of, see :func:`kind_of`.
        directions: V, float32 ``[m, r]``, of orthonormal columns.
        steps: float32 ``[r]``: what one unit of a code is.
        codes: int8 ``[N, r]``, ``steps · code ≈ Vᵀz``.
        roundings: ``‖Vᵀz − steps · code‖``, float32 ``[N]``.
        residuals: at least ``‖z − V Vᵀz‖``, float32 ``[N]``.
        lengths: ``‖z‖``, float32 ``[N]``.
    """

    kind: dict[str, str]
    directions: np.ndarray
    steps: np.ndarray
    codes: np.ndarray
    roundings: np.ndarray
    residuals: np.ndarray
    lengths: np.ndarray

    def bounds(self, queries: Tensor) -> Tensor:
        """Return what no score exceeds, ``[Q, N]``.

        With a = Vᵀq, p = Vᵀz, and p' as it is kept,

        ``⟨q, z⟩ ≤ ⟨a, p'⟩ + ‖a‖ ‖p − p'‖ + ‖q − Va‖ ‖z − Vp‖ + ε ‖q‖ ‖z‖``

        by Cauchy–Schwarz; ε = 8 √m 2⁻²⁴ allows for the rounding of all sums of m terms in float32,
        of the exact scores as well (Higham & Mary 2019, SIAM J. Sci. Comput. 41: √m u with
        overwhelming probability; the store's own rounding has no part: z is what is read back).

        Args:
            queries: float32 ``[Q, m]``, few.
        """
        basis = torch.from_numpy(self.directions)
        inside = queries @ basis
        outside = torch.linalg.vector_norm(queries - inside @ basis.T, dim=1)
        norm, length = torch.linalg.vector_norm(inside, dim=1), queries.norm(dim=1)
        slack = 8 * len(basis) ** 0.5 * 2.0**-24 * length
        asked = (inside * torch.from_numpy(self.steps)).numpy()[:, None]
        found = torch.empty(len(queries), len(self.codes))
        scores = found.numpy()
        allowances = (
            (norm.numpy(), self.roundings),
            (outside.numpy(), self.residuals),
            (slack.numpy(), self.lengths),
        )

        def part(span: Span) -> None:
            rows = slice(*span)
            codes, count = self.codes[rows, None], span[1] - span[0]
            ones = np.ones((count, 1), np.float32)
            unchecked = np.zeros(count, np.uint32)
            multiply(codes, ones, unchecked, asked, scores[:, rows])
            for factor, array in allowances:
                scores[:, rows] += factor[:, None] * array[rows]

        spans = [(at, min(at + SPAN, len(self.codes))) for at in range(0, len(self.codes), SPAN)]
        for _ in in_threads(part, spans, compiled=True):
            pass
        return found

    @classmethod
    def build(
        cls,
        store: Store,
        linear: InnerProduct,
        directions: int = 256,
        passes: int = 2,
        seed: int = 0,
    ) -> ProjectionIndex:
        """Read a store ``passes`` times in part and once as a whole.

        Args:
            store: the rows.
            linear: for its readout and scale; its queries are not looked at.
            directions: r; more make the index larger and the part of the store read smaller.
            passes: of the subspace iteration.
            seed: of the first directions.
        """
        width = int(np.prod(store.layout.row_shape))
        rank = min(directions, width, len(store))
        factors = row_factors(store, linear)
        spans = [(at, min(at + ROWS, len(store))) for at in range(0, len(store), ROWS)]
        some = spans[:: max(1, len(store) // SAMPLE)]

        def iterate(span: Span) -> Tensor:
            parts = decoded_rows(store, linear.readout, span, factors, ROWS)
            return reduce(torch.add, (rows.T @ (rows @ basis) for _, rows in parts))

        def project(span: Span) -> tuple[Tensor, Tensor]:
            found = []
            for _, rows in decoded_rows(store, linear.readout, span, factors, ROWS):
                found.append((rows @ basis, torch.linalg.vector_norm(rows, dim=1)))
            return _concatenated(found)

        generator = torch.Generator().manual_seed(seed)
        basis = _orthonormal(torch.randn(width, rank, generator=generator))
        for _ in range(passes):
            total = torch.zeros(width, rank)
            for part in in_threads(iterate, some):
                total += part
            basis = _orthonormal(total)
        inside, lengths = _concatenated(in_threads(project, spans))
        left = lengths.square() - torch.linalg.vector_norm(inside, dim=1).square()
        residuals = (left.clamp(min=0) + SLACK * lengths.square()).sqrt()
        codes, steps, roundings = _coded(inside)
        arrays = (each.numpy() for each in (basis, steps, codes, roundings, residuals, lengths))
        return cls(kind_of(store, linear), *arrays)

    def decoded(self, rows: slice) -> np.ndarray:
        """Return projections of some rows as they are kept, float32 ``[n, r]``."""
        return self.codes[rows] * self.steps

    @staticmethod
    def path(store: Store, linear: InnerProduct, directions: int) -> Path:
        """Return where the index of a store is kept: in its directory."""
        return store.path / f"index-{linear.readout}-{linear.scale}-{directions}.kept"

    @classmethod
    def of(cls, store: Store, linear: InnerProduct, directions: int = 256) -> ProjectionIndex:
        """Return the index kept with a store; build and keep it if it is missing or stale."""
        path, kind = cls.path(store, linear, directions), kind_of(store, linear)
        count, width = len(store), int(np.prod(store.layout.row_shape))
        rank = min(directions, width, count)
        rows: tuple[Any, tuple[int, ...]] = (np.float32, (count,))
        shapes = {"roundings": rows, "residuals": rows, "lengths": rows}
        shapes |= {"directions": (np.float32, (width, rank)), "steps": (np.float32, (rank,))}
        if (found := of_kind(path, kind)) is not None:
            if found.has({**shapes, "codes": (np.int8, (count, rank))}):
                return cls(kind, **found.arrays)
            remark(path, "its arrays are not those of this store")
        index = cls.build(store, linear, directions)
        keep_where_possible(path, kind, {name: getattr(index, name) for name in ARRAYS})
        return index


def kind_of(store: Store, linear: InnerProduct) -> dict[str, str]:
    """Return what an index is of."""
    return {"store": store.fingerprint, "readout": linear.readout, "scale": linear.scale}


def of_kind(path: Path, kind: Mapping[str, Any]) -> Kept | None:
    """Return an index kept with a store; None if it is missing, damaged, or of anything else."""
    found = kept(path)
    return found if found is not None and found.about == kind else None


def keep_where_possible(
    path: Path, kind: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Keep an index with its store; where that cannot be, say so: it is in memory all the same."""
    try:
        keep(path, kind, arrays)
    except OSError as error:
        warnings.warn(
            f"The index {path} could not be kept ({error.strerror}): it is in memory, and made"
            " again in every run. Make room or give yourself permission to change that.",
            DminWarning,
            stacklevel=3,
        )


def _coded(inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, steps and the lengths of what rounding to them leaves, a little too large."""
    steps = inside.abs().amax(0).clamp(min=1e-30) / 127
    codes = (inside / steps).round().clamp(-127, 127).to(torch.int8)
    parts = zip(inside.split(SPAN), codes.split(SPAN), strict=True)
    left = [torch.linalg.vector_norm(one - code.float() * steps, dim=1) for one, code in parts]
    return codes, steps, torch.cat(left) * 1.0001


def _concatenated(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*parts, strict=True)
    return torch.cat(first), torch.cat(second)


def _orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns, exact to float32."""
    return torch.linalg.qr(columns.double())[0].float().contiguous()
