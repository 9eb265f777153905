"""All scores: blocks of training examples against batches of queries."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.check import check_pair
from dmin.attribution.features import FeatureSet
from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.method import Method
from dmin.attribution.search.scan import scan
from dmin.store import Store

QUERY_BYTES = 256 << 20  # of query features in memory at once


def score_matrix(
    queries: Store | FeatureSet, train: Store | FeatureSet, method: Method, rows: int | None = None
) -> np.ndarray:
    """Return every score, float32 ``[queries, examples]``; arguments as in `retrieve`."""
    queries, train = as_feature_set(queries), as_feature_set(train)
    check_pair(queries, train, method)
    method.fit(train)
    return fitted_scores(queries, train, method, rows)


def fitted_scores(
    queries: FeatureSet, train: FeatureSet, method: Method, rows: int | None = None
) -> np.ndarray:
    """Return every score by a method that is already fitted."""
    batches = [
        torch.cat([scores.float() for _, scores in scored(asked, train, method, rows)], dim=1)
        for _, asked in query_batches(queries, method)
    ]
    return torch.cat(batches).numpy()


def query_batches(queries: FeatureSet, method: Method) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield batches of queries that fit into memory, with their prepared form."""
    width = 4 * int(np.prod(queries.store.layout.row_shape)) * len(method.requires.readouts)
    most = max(1, QUERY_BYTES // max(width, 1 << 16))
    for start in range(0, len(queries), most):
        rows = np.arange(start, min(start + most, len(queries)))
        yield rows, method.transform_query(queries.block(rows, method.requires))


def scored(
    asked: Any,
    train: FeatureSet,
    method: Method,
    rows: int | None = None,
    keep: np.ndarray | None = None,
    device: str = "cpu",
) -> Iterator[tuple[int, Tensor]]:
    """Yield first row and scores ``[Q, n]`` of every block, by the fastest available path."""
    if isinstance(asked, InnerProduct):
        if device != "cpu":
            asked = replace(asked, queries=asked.queries.to(device))
        yield from scan(asked, train.store, rows, keep)
    else:
        size = rows or 1024
        for first in range(0, len(train), size):
            span = np.arange(first, min(first + size, len(train)))
            if keep is None or keep[span].any():
                yield first, method.score(asked, train.block(span, method.requires))


def as_feature_set(side: Store | FeatureSet) -> FeatureSet:
    """Wrap a store as a feature set without a dataset."""
    return side if isinstance(side, FeatureSet) else FeatureSet(side)
