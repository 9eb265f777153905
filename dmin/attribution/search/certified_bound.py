"""The certified bound: an upper bound of each score, from projections on a few directions."""

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
from dmin.attribution.search.contenders import RELATIVE
from dmin.attribution.search.scan import Span, decoded_rows, multiply, row_factors, spans
from dmin.attribution.search.threads import in_threads
from dmin.runtime.array_files import ArrayFile, read_arrays, warn_damaged, write_arrays
from dmin.runtime.errors import DminWarning
from dmin.store import Store

ROWS = 256  # in one matrix product
SAMPLE = 16_384  # rows that the directions are found on
SPAN = 65_536  # codes of one thread at a time
SMALLEST = 2.0**-120  # more than what numbers below float32's least add up to
COLUMNS = 4096  # of the directions that are double at a time
ARRAYS = ("directions", "steps", "codes", "roundings", "residuals", "lengths")


@dataclass(frozen=True)
class ProjectionIndex:
    """For every row z (scaled and concatenated over draws, timesteps and groups) a code of Vᵀz.

    V are about the leading eigenvectors of ZᵀZ, found by streamed randomised subspace iteration
    (Halko, Martinsson & Tropp 2011, arXiv 0909.4061) in memory of a few ``m × r`` matrices. Their
    quality affects how much a search reads, never what it finds. Projections are stored as one
    byte for each direction, together with the norms of the rounding errors.

    Args:
        kind: identifies the rows, see :func:`kind_of`.
        directions: V, float32 ``[m, r]``, of orthonormal columns.
        steps: float32 ``[r]``: the size of one unit of a code.
        codes: int8 ``[N, r]``, ``steps · code ≈ Vᵀz``.
        roundings: at least ``‖Vᵀz − steps · code‖``, float32 ``[N]``.
        residuals: at least ``‖z − V Vᵀz‖``, float32 ``[N]``.
        lengths: at least ``‖z‖``, float32 ``[N]``.
    """

    kind: dict[str, str]
    directions: np.ndarray
    steps: np.ndarray
    codes: np.ndarray
    roundings: np.ndarray
    residuals: np.ndarray
    lengths: np.ndarray

    def bounds(self, queries: Tensor) -> np.ndarray:
        """Return an upper bound of each inner product of query and stored row, float32 ``[Q, N]``.

        With a = Vᵀq, p = Vᵀz, and p' its stored code,

        ``⟨q, z⟩ ≤ ⟨a, p'⟩ + ‖a‖ ‖p − p'‖ + ‖q − Va‖ ‖z − Vp‖ + η ‖q‖ ‖z‖``

        by Cauchy–Schwarz, for exact numbers and any code. η bounds the rounding of the
        terms: ``⟨a, p'⟩`` is added up as scores are (:data:`RELATIVE`), rows were decoded in
        float32, and V, orthonormal in double, was rounded: ``‖VᵀV − I‖ ≤ δ = 2.1 √r 2⁻²⁴``, which
        enters by ``⟨Vᵀ(q − Va), p⟩`` and under the roots of both residuals. Everything else is
        double. Bounds that are not finite exclude nothing.

        Args:
            queries: float32 ``[Q, m]``, few.
        """
        asked = queries.double().numpy()
        inside = np.zeros((len(asked), len(self.steps)))
        for first in range(0, asked.shape[1], COLUMNS):
            part = slice(first, first + COLUMNS)
            inside += asked[:, part] @ self.directions[part].astype(np.float64)
        square, length = np.square(inside).sum(1), np.linalg.norm(asked, axis=1)
        loose = _looseness(len(self.steps))
        outside = np.sqrt(np.maximum(length**2 - square, 0) + loose * length**2)
        allowances = (
            (np.sqrt(square), self.roundings),
            (outside, self.residuals),
            ((2 * RELATIVE + loose) * length, self.lengths),
        )
        scaled = (inside * self.steps).astype(np.float32)[:, None]
        found = np.empty((len(asked), len(self.codes)), np.float32)

        def part_of(span: Span) -> None:
            rows, count = slice(*span), span[1] - span[0]
            scores = np.empty((len(asked), count))
            ones, unchecked = np.ones((count, 1), np.float32), np.zeros(count, np.uint32)
            multiply(self.codes[rows, None], ones, unchecked, scaled, scores)
            for factor, array in allowances:
                scores += factor[:, None] * array[rows] + SMALLEST
            scores[~np.isfinite(scores)] = np.inf
            found[:, rows] = np.nextafter(scores.astype(np.float32), np.float32(np.inf))

        for _ in in_threads(part_of, spans(len(self.codes), SPAN), compiled=True):
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
        """Build an index: read a sample of the store ``passes`` times, then all of it once.

        Args:
            store: the rows.
            linear: for its readout and scale; its queries are not used.
            directions: r; more make the index larger and the part of the store read smaller.
            passes: of the subspace iteration.
            seed: of the first directions.
        """
        width = int(np.prod(store.layout.row_shape))
        rank = min(directions, width, len(store))
        factors = row_factors(store, linear)
        whole = spans(len(store), ROWS)
        some = whole[:: max(1, len(store) // SAMPLE)]

        def iterate(span: Span) -> Tensor:
            parts = decoded_rows(store, linear.readout, span, factors, ROWS)
            return reduce(torch.add, (rows.T @ (rows @ basis) for _, rows in parts))

        def project(span: Span) -> tuple[Tensor, Tensor]:
            found = []
            for _, rows in decoded_rows(store, linear.readout, span, factors, ROWS):
                wide = rows.double()
                found.append((wide @ exact, torch.linalg.vector_norm(wide, dim=1)))
            return _concatenated(found)

        generator = torch.Generator().manual_seed(seed)
        basis = _orthonormal(torch.randn(width, rank, generator=generator))
        for _ in range(passes):
            total = torch.zeros(width, rank)
            for part in in_threads(iterate, some):
                total += part
            basis = _orthonormal(total)
        exact = basis.double()
        inside, lengths = _concatenated(in_threads(project, whole))
        left = lengths.square() - torch.linalg.vector_norm(inside, dim=1).square()
        residuals = (left.clamp(min=0) + _looseness(rank) * lengths.square()).sqrt()
        codes, steps, roundings = _coded(inside)
        kept = basis, steps, codes, *(_raised(each) for each in (roundings, residuals, lengths))
        arrays = (each.numpy() for each in kept)
        return cls(kind_of(store, linear), *arrays)

    def decoded(self, rows: slice) -> np.ndarray:
        """Return the stored projections of some rows, float32 ``[n, r]``."""
        return self.codes[rows] * self.steps

    @staticmethod
    def path(store: Store, linear: InnerProduct, directions: int) -> Path:
        """Return the path of a store's cached index, in its directory."""
        return store.path / f"index-{linear.readout}-{linear.scale}-{directions}.kept"

    @classmethod
    def of(cls, store: Store, linear: InnerProduct, directions: int = 256) -> ProjectionIndex:
        """Return the cached index of a store; build it if it is missing or out of date."""
        path, kind = cls.path(store, linear, directions), kind_of(store, linear)
        count, width = len(store), int(np.prod(store.layout.row_shape))
        rank = min(directions, width, count)
        rows: tuple[Any, tuple[int, ...]] = (np.float32, (count,))
        shapes = {"roundings": rows, "residuals": rows, "lengths": rows}
        shapes |= {"directions": (np.float32, (width, rank)), "steps": (np.float32, (rank,))}
        if (found := of_kind(path, kind)) is not None:
            if found.has({**shapes, "codes": (np.int8, (count, rank))}):
                return cls(kind, **found.arrays)
            warn_damaged(path, "its arrays are not those of this store")
        index = cls.build(store, linear, directions)
        keep_where_possible(path, kind, {name: getattr(index, name) for name in ARRAYS})
        return index


def kind_of(store: Store, linear: InnerProduct) -> dict[str, str]:
    """Return what identifies the rows of an index."""
    return {"store": store.fingerprint, "readout": linear.readout, "scale": linear.scale}


def of_kind(path: Path, kind: Mapping[str, Any]) -> ArrayFile | None:
    """Return the cached index of a store; None if it is missing, damaged, or of other rows."""
    found = read_arrays(path)
    return found if found is not None and found.about == kind else None


def keep_where_possible(
    path: Path, kind: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Cache an index with its store; warn if that fails, as it is then only in memory."""
    try:
        write_arrays(path, kind, arrays)
    except OSError as error:
        warnings.warn(
            f"The index {path} could not be saved ({error.strerror}): it is kept in memory and "
            "rebuilt in every run. Free some space or grant write permission to avoid that.",
            DminWarning,
            stacklevel=3,
        )


def _looseness(directions: int) -> float:
    """Return the error of ``‖z‖² − ‖Vᵀz‖²`` as a share of ``‖z‖²``; see ``bounds``.

    Rows are decoded in float32 with at most five roundings, which enter four times.
    """
    return (40 + 2.1 * directions**0.5) * 2.0**-24


def _raised(array: Tensor) -> Tensor:
    """Round up to float32, with a margin for rounded terms."""
    return (array * (1 + 2e-5) + SMALLEST).float()


def _coded(inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, steps and the norms of the rounding errors, in double."""
    steps = (inside.abs().amax(0) / 127).clamp(min=1e-30).float()
    codes = (inside / steps).round().clamp(-127, 127).to(torch.int8)
    parts = zip(inside.split(SPAN), codes.split(SPAN), strict=True)
    left = [torch.linalg.vector_norm(one - code.double() * steps, dim=1) for one, code in parts]
    return codes, steps, torch.cat(left)


def _concatenated(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*parts, strict=True)
    return torch.cat(first), torch.cat(second)


def _orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns, exact to float32."""
    return torch.linalg.qr(columns.double())[0].float().contiguous()
