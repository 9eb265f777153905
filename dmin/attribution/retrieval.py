"""Exact retrieval: stream the training examples past all queries and keep the best."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dmin.attribution.check import check_pair
from dmin.attribution.features import FeatureSet
from dmin.attribution.method import Method
from dmin.attribution.methods.dmin import DMin
from dmin.attribution.ranking import Ranking
from dmin.attribution.request import Request
from dmin.attribution.scores import as_feature_set, query_batches
from dmin.attribution.search.index import Index
from dmin.attribution.search.selection import Groups, Selection
from dmin.store import Store


def retrieve(
    queries: Store | FeatureSet,
    train: Store | FeatureSet,
    method: Method | None = None,
    k: int = 10,
    rows: int | None = None,
    selection: Selection | None = None,
    index: Index | None = None,
    device: str = "cpu",
) -> Ranking:
    """Return the k training examples of largest score for each query, best first.

    The training store is read once for as many queries as fit into 256 MiB; memory does not grow
    with it. Equal scores are ordered by row, so the answer does not depend on the blocks.

    Args:
        queries: features of the queries.
        train: features of the training examples, made with the same model, schedule and sketch.
        method: how to score; :class:`DMin` if none.
        k: examples a query, or groups.
        rows: training examples in memory at once; by their size if None.
        selection: other examples than the ones of largest score.
        index: a way to the best rows that does not read all, built once and kept with the training
            store: :class:`Certified` gives the same answer, :class:`Approximate` perhaps another.
        device: where rows are multiplied, such as ``cuda``; what is no inner product, and what an
            index finds, is on the CPU.

    Raises:
        DminError: the stores do not belong together, are incomplete, or k is out of range.
    """
    queries, train = as_feature_set(queries), as_feature_set(train)
    method, selection = method or DMin(), selection or Selection()
    check_pair(queries, train, method)
    return _searched(queries, Request(train, method, k, rows, selection, index, device))


def retrieve_part(
    queries: Store | FeatureSet,
    train: Store | FeatureSet,
    part: range,
    method: Method | None = None,
    k: int = 10,
    rows: int | None = None,
    selection: Selection | None = None,
    index: Index | None = None,
    device: str = "cpu",
) -> Ranking | Groups | None:
    """Return the best of some of the training rows, or what they add to each group.

    So that several machines may read a part of the store each; ``merge.merged`` makes one answer of
    rankings, :func:`ranked_groups` of groups. Rows and scores are those of :func:`retrieve` to the
    bit, wherever the cuts lie; contributions, sums and means of groups to rounding.

    Args:
        queries: as in :func:`retrieve`, like all that follow.
        train: the whole training side, from which the method learns what it learns.
        part: the rows to look at.
        method: how to score.
        k: examples a query in the end.
        rows: training examples in memory at once.
        selection: which examples; its ``min_score`` is for ``merged``.
        index: a way that reads less than all rows.
        device: where to scan.

    Returns:
        The k best, or all where the part has fewer; None where it has none. With ``group_by`` the
        state of the groups.

    Raises:
        DminError: as in :func:`retrieve`.
    """
    queries, train = as_feature_set(queries), as_feature_set(train)
    method, selection = method or DMin(), selection or Selection()
    check_pair(queries, train, method)
    request = Request(train, method, k, rows, replace(selection, min_score=None), index, device)
    if not request.narrow(part):
        return None
    return _searched(queries, request) if request.groups is None else _tallied(queries, request)


def ranked_groups(
    queries: Store | FeatureSet,
    train: Store | FeatureSet,
    tallies: Sequence[Groups],
    method: Method | None = None,
    k: int = 10,
    selection: Selection | None = None,
) -> Ranking:
    """Return the ranking of groups that `retrieve` gives, from the tallies of all parts.

    Args:
        queries: as in :func:`retrieve`, like all that follow but one.
        train: the whole training side.
        tallies: what :func:`retrieve_part` found in parts that share no row.
        method: how it was scored.
        k: groups a query.
        selection: which groups, and what their score is.

    Raises:
        DminError: as in :func:`retrieve`.
    """
    queries, train = as_feature_set(queries), as_feature_set(train)
    method, selection = method or DMin(), selection or Selection()
    request = Request(train, method, k, None, selection, None, "cpu")
    assert request.groups is not None
    whole = Groups(len(queries), *request.groups)
    for each in tallies:
        whole.join(each)
    batches: Iterable[tuple[np.ndarray, Any]] = [(np.arange(len(queries)), None)]
    if selection.group_score == "max":  # a single example's score, which is split once more
        method.fit(train)
        batches = query_batches(queries, method)
    found = [
        request.best_groups(whole.of_queries(numbers), queries, numbers, asked)
        for numbers, asked in batches
    ]
    return request.answer(queries, found)


def _searched(queries: FeatureSet, request: Request) -> Ranking:
    request.method.fit(request.train)
    found = [request.batch(queries, *batch) for batch in query_batches(queries, request.method)]
    return request.answer(queries, found)


def _tallied(queries: FeatureSet, request: Request) -> Groups:
    request.method.fit(request.train)
    found = [request.gathered(asked) for _, asked in query_batches(queries, request.method)]
    whole, *rest = [batch for batch in found if isinstance(batch, Groups)]
    for batch in rest:
        whole.extend(batch)
    return whole
