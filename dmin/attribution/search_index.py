"""A small index of a store: projections of its rows on few directions, and what these leave out."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.base import Linear
from dmin.attribution.search_scan import Span, decoded_rows, in_threads, row_factors
from dmin.errors import DminError
from dmin.store import Store

ROWS = 256  # in one matrix product
SAMPLE = 16_384  # rows that the directions are found on
TENSORS = ("directions", "projections", "residuals")


@dataclass(frozen=True)
class ProjectionIndex:
    """For every row z (scaled and concatenated over draws, timesteps and groups): Vᵀz, ‖z − V Vᵀz‖.

    V are about the leading eigenvectors of ZᵀZ, found by streamed randomised subspace iteration
    (Halko, Martinsson & Tropp 2011, arXiv 0909.4061) in memory of a few ``m × r`` matrices. How
    near they come decides how much a search reads, never what it finds.

    Args:
        store: fingerprint of the store.
        readout: whose rows.
        scale: how they were scaled, see :class:`Linear`.
        directions: V, float32 ``[m, r]``, of orthonormal columns.
        projections: float32 ``[N, r]``.
        residuals: float32 ``[N]``.
    """

    store: str
    readout: str
    scale: str
    directions: Tensor
    projections: Tensor
    residuals: Tensor

    @cached_property
    def lengths(self) -> Tensor:
        """The lengths of the rows, ``[N]``: of what lies within the directions and of the rest."""
        return torch.linalg.vector_norm(self.projections, dim=1).hypot(self.residuals)

    @classmethod
    def build(
        cls,
        store: Store,
        linear: Linear,
        directions: int = 64,
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
        if rank < 1:
            raise DminError(f"retrieve.index={directions}: an index needs 1 direction or more.")
        factors = row_factors(store, linear)
        spans = [(at, min(at + ROWS, len(store))) for at in range(0, len(store), ROWS)]
        some = spans[:: max(1, len(store) // SAMPLE)]

        def iterate(span: Span) -> Tensor:
            parts = decoded_rows(store, linear.readout, span, factors, ROWS)
            return reduce(torch.add, (rows.T @ (rows @ basis) for _, rows in parts))

        def project(span: Span) -> tuple[Tensor, Tensor]:
            found = []
            for _, rows in decoded_rows(store, linear.readout, span, factors, ROWS):
                inside = rows @ basis
                # Measured, not ‖z‖² − ‖Vᵀz‖²: near 0 nothing would be left of that difference.
                found.append((inside, torch.linalg.vector_norm(rows - inside @ basis.T, dim=1)))
            return _concatenated(found)

        generator = torch.Generator().manual_seed(seed)
        basis = _orthonormal(torch.randn(width, rank, generator=generator))
        for _ in range(passes):
            total = torch.zeros(width, rank)
            for part in in_threads(iterate, some):
                total += part
            basis = _orthonormal(total)
        inside, left = _concatenated(in_threads(project, spans))
        kind = store.fingerprint, linear.readout, linear.scale
        return cls(*kind, basis, inside, left)

    @staticmethod
    def path(store: Store, linear: Linear, directions: int) -> Path:
        """Return where the index of a store is kept: in its directory."""
        return store.path / f"index-{linear.readout}-{linear.scale}-{directions}.npz"

    @classmethod
    def of(cls, store: Store, linear: Linear, directions: int = 64) -> ProjectionIndex:
        """Return the index kept with a store; build and keep it if it is missing or stale."""
        path = cls.path(store, linear, directions)
        if path.is_file():
            index = cls._read(path)
            if index.store == store.fingerprint:
                return index
        index = cls.build(store, linear, directions)
        index.save(path)
        return index

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        content: dict[str, Any] = {name: getattr(self, name).numpy() for name in TENSORS}
        content["about"] = np.array([self.store, self.readout, self.scale])
        try:
            with open(temporary, "xb") as file:
                np.savez(file, **content)
            os.replace(temporary, path)
        except OSError as error:
            raise DminError(
                f"The index {path} could not be written ({error.strerror}): make room or give"
                " yourself permission, or search without an index (retrieve.index=null)."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], store: Store) -> ProjectionIndex:
        """Read an index back.

        Raises:
            DminError: it is damaged, or of other rows than the store's.
        """
        index = cls._read(Path(path))
        if index.store != store.fingerprint:
            raise DminError(
                f"The index {path} is stale: it was made for the rows {index.store}, the store"
                f" {store.path} now has {store.fingerprint}. Delete it and build it again."
            )
        return index

    @classmethod
    def _read(cls, path: Path) -> ProjectionIndex:
        try:
            with np.load(path) as file:
                store, readout, scale = (str(text) for text in file["about"])
                tensors = {name: torch.from_numpy(file[name]) for name in TENSORS}
                return cls(store, readout, scale, **tensors)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DminError(
                f"{path} is not an index or is damaged ({error}): delete it and build it again."
            ) from error


def _concatenated(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*parts, strict=True)
    return torch.cat(first), torch.cat(second)


def _orthonormal(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns, exact to float32."""
    return torch.linalg.qr(columns.double())[0].float().contiguous()
