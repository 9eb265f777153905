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

    The training store is read once for each batch of queries that fits into 256 MiB; memory does
    not grow with the store. Equal scores are ordered by row, so the answer does not depend on
    blocks.

    Args:
        queries: features of the queries.
        train: features of the training examples, made with the same model, schedule and sketch.
        method: how to score; :class:`DMin` if none.
        k: examples, or groups, per query.
        rows: training examples in memory at once; by their size if None.
        selection: filters, order and groups; the largest scores if None.
        index: a search that does not read all rows, built once and cached with the training store:
            :class:`Certified`
            gives the same answer, :class:`Approximate` an approximate one.
        device: where rows are multiplied, such as ``cuda``; scores that are not inner products,
            and indices, use the CPU.

    Raises:
        DminError: the stores cannot be compared, are incomplete, or k is out of range.
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
    """Return the best of some of the training rows, or their tallies of groups.

    Lets several machines read a part of the store each; ``merge.merged`` joins rankings,
    :func:`ranked_groups` groups. Rows and scores equal those of :func:`retrieve` to the bit, for
    any division into parts; contributions, sums and means of groups up to rounding.

    Args:
        queries: as in :func:`retrieve`, also for the others.
        train: all training examples, which the method is fitted to.
        part: the rows to look at.
        method: how to score.
        k: examples per query in the end.
        rows: training examples in memory at once.
        selection: which examples; its ``min_score`` is for ``merged``.
        index: a search that does not read all rows.
        device: where to scan.

    Returns:
        The k best, or all if the part has fewer; None if it has none. With ``group_by`` the
        tallies of the groups.

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
    """Return the same ranking of groups as `retrieve`, from the tallies of all parts.

    Args:
        queries: as in :func:`retrieve`, also for the others except tallies.
        train: the whole training side.
        tallies: results of :func:`retrieve_part` for disjoint parts.
        method: how it was scored.
        k: groups per query.
        selection: which groups, and how they are scored.

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
