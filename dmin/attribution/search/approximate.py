"""Approximate search: faiss proposes rows, exact scores rank them, recall is always measured."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.search.certified_bound import (
    ProjectionIndex,
    keep_where_possible,
    kind_of,
    of_kind,
)
from dmin.attribution.search.contenders import Contenders, ErrorBound, best_of, best_of_all
from dmin.attribution.search.index import Found, Index, require_count
from dmin.attribution.search.scan import row_factors, scores_of_rows
from dmin.attribution.search.threads import in_threads
from dmin.runtime.array_files import ArrayFile, warn_damaged
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import fingerprint
from dmin.store import Store

TRAIN = 200_000  # rows that faiss learns its cells and codes on
ADD = 65_536  # rows that are handed over at a time


class Approximate(Index):
    """Approximate search: the best of the rows that a faiss index proposes.

    faiss sees the projections on the store's leading directions (:class:`ProjectionIndex`), a
    few hundred numbers per row, so that a million rows of any width take 1 GB at most while it is
    built; what it proposes is scored exactly. Recall is measured on the first queries against
    a full scan, and reported with the answer.

    Args:
        factory: as for ``faiss.index_factory``: ``Flat``, ``HNSW32``, ``IVF{cells},Flat``,
            ``IVF{cells},PQ64``; ``{cells}`` becomes 4 √N.
        search: search parameters, such as ``{nprobe: 16}`` or ``{efSearch: 128}``.
        directions: dimensions of the projections that faiss indexes.
        candidates: rows proposed for each requested result.
        recall_queries: queries that are also searched exactly; 0 for none.

    Raises:
        DminError: faiss is not installed, the factory or a parameter is unknown, or a number is no
            whole one.
    """

    def __init__(
        self,
        factory: str = "HNSW32",
        search: Mapping[str, float] | None = None,
        directions: int = 256,
        candidates: int = 20,
        recall_queries: int = 16,
    ) -> None:
        require_count("index.directions", directions)
        require_count("index.candidates", candidates)
        require_count("index.recall_queries", recall_queries, 0)
        self.factory = factory
        self.parameters: dict[str, float] = dict(search or {})
        self.directions = directions
        self.candidates = candidates
        self.recall_queries = recall_queries
        self._of: dict[str, str] = {}
        self._index: Any = None
        self._basis = torch.empty(0)
        self._hits: list[float] = []
        self._read: list[np.ndarray] = []

    def search(
        self,
        linear: InnerProduct,
        store: Store,
        k: int,
        sign: int = 1,
        keep: np.ndarray | None = None,
    ) -> Found:
        """Return the best k of the rows proposed, by their exact scores."""
        if keep is not None:
            raise DminError(
                "approximate indices cannot filter by retrieve.where. Set index=certified or "
                "index=null."
            )
        if self._of != kind_of(store, linear):
            self._prepare(store, linear)
        signed = linear.times(sign)
        queries = signed.queries.flatten(1).cpu()
        count = min(self.candidates * k, len(store))
        with _one_library(torch.get_num_threads()):
            _, proposed = self._index.search((queries @ self._basis).numpy(), count)
        factors, bound = row_factors(store, linear), ErrorBound(signed, store)

        def rank(number: int) -> Contenders:
            rows = np.sort(proposed[number][proposed[number] >= 0])
            if len(rows) < k:
                raise DminError(
                    f"faiss proposed {len(rows)} of {k} rows: raise index.search (nprobe, "
                    "efSearch) or index.candidates."
                )
            best = Contenders(signed.queries[number], linear, store, k)
            scores = scores_of_rows(store, linear, factors, queries[number], rows)
            best.add(rows, scores.numpy(), bound.errors(number, rows))
            best.settle()
            return best

        found = list(in_threads(rank, range(len(queries))))
        scores, rows, _ = best_of(found)
        self._read.append((proposed >= 0).sum(1) / len(store))
        self._measure(signed, store, rows)
        return Found(sign * scores, rows, (proposed >= 0).sum(1))

    def note(self) -> str:
        """State the recall and how it was measured."""
        part = f"{100 * np.concatenate(self._read).mean():.2g} % of the rows read for a query"
        if not self._hits:
            return f"approximate by faiss {self.factory}, recall not measured, {part}"
        return (
            f"approximate by faiss {self.factory}, recall {np.mean(self._hits):.3f} "
            f"measured on {len(self._hits)} queries, {part}"
        )

    def _measure(self, linear: InnerProduct, store: Store, rows: Tensor) -> None:
        """Compare the first queries with an exact search."""
        count = min(self.recall_queries - len(self._hits), len(rows))
        if count <= 0:
            return
        first = replace(linear, queries=linear.queries[:count])
        best = best_of_all(first, store, rows.shape[1])[1]
        for found, exact in zip(rows.tolist(), best.tolist(), strict=False):
            self._hits.append(len({*found} & {*exact}) / len(exact))

    def path(self, store: Store, linear: InnerProduct) -> Path:
        """Return the path of a store's cached index, in its directory."""
        kind = fingerprint({"factory": self.factory, "directions": self.directions})[:8]
        return store.path / f"index-{linear.readout}-{linear.scale}-faiss-{kind}.kept"

    def _prepare(self, store: Store, linear: InnerProduct) -> None:
        """Load the cached index of a store, or build it."""
        path = self.path(store, linear)
        projections = ProjectionIndex.of(store, linear, self.directions)
        with _one_library(torch.get_num_threads()) as faiss:
            kind = {**kind_of(store, linear), "factory": self.factory, "faiss": faiss.__version__}
            found = of_kind(path, kind)
            self._index = None if found is None else _unpacked(faiss, found, projections)
            if found is not None and self._index is None:
                warn_damaged(path, "faiss finds no index of this store in it")
            if self._index is None:
                self._index = self._built(faiss, projections)
                keep_where_possible(path, kind, {"index": faiss.serialize_index(self._index)})
            self._set(faiss)
        self._basis = torch.from_numpy(projections.directions)
        self._of = kind_of(store, linear)

    def _built(self, faiss: Any, projections: ProjectionIndex) -> Any:
        count, width = projections.codes.shape
        try:
            factory = self.factory.format(cells=max(1, min(count // 40, round(4 * count**0.5))))
            index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                some = slice(None, None, -(-count // TRAIN))
                index.train(np.ascontiguousarray(projections.decoded(some)))
            for start in range(0, count, ADD):
                index.add(np.ascontiguousarray(projections.decoded(slice(start, start + ADD))))
        except (RuntimeError, KeyError, AssertionError) as error:
            raise _unknown(self.factory, error) from error
        return index

    def _set(self, faiss: Any) -> None:
        space = faiss.ParameterSpace()
        for name, value in self.parameters.items():
            try:
                space.set_index_parameter(self._index, name, value)
            except RuntimeError as error:
                raise DminError(
                    f"index.search: a faiss index {self.factory!r} has no parameter {name}={value}:"
                    " IVF has nprobe, HNSW has efSearch."
                ) from error


def _unpacked(faiss: Any, found: ArrayFile, projections: ProjectionIndex) -> Any:
    """Return the cached index; None if its rows or directions differ."""
    try:
        index = faiss.deserialize_index(found.arrays["index"])
    except (KeyError, RuntimeError, TypeError, AssertionError):
        return None
    return index if (index.ntotal, index.d) == projections.codes.shape else None


def _unknown(factory: str, error: Exception) -> DminError:
    first = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return DminError(
        f"faiss cannot make or search index.factory={factory!r} for these rows ({first}): use Flat,"
        " HNSW32, IVF{cells},Flat or IVF{cells},PQ64; for PQ, its number must divide "
        "index.directions."
    )


@contextmanager
def _one_library(threads: int) -> Iterator[Any]:
    """Give faiss as many threads as torch has."""
    try:
        faiss: Any = import_module("faiss")
    except ImportError as error:
        raise DminError(
            "index: approximate search needs faiss: pip install 'dmin[faiss]', or set "
            "index=certified, which needs no package and is exact."
        ) from error
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)
