"""The exact scan: every row of a store past all queries, at the speed of memory.

A block of rows is scored by one thread, as many blocks at a time as torch has threads: threads that
wait for each other inside every small operation lose most of their time on a busy machine. Within
a block, rows are decoded a few at a time into a buffer that stays in the cache, where the matrix
product finds them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from threading import Barrier
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.base import Linear
from dmin.store import Store

BLOCK_BYTES = 32 << 20  # of stored rows: what one thread takes at a time
BUFFER_BYTES = 4 << 20  # of decoded rows: what stays in the cache
Span = tuple[int, int]
In = TypeVar("In")
Out = TypeVar("Out")


def scan(
    linear: Linear, store: Store, rows: int | None = None, keep: np.ndarray | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Score all rows of a store.

    Args:
        linear: the queries.
        store: the rows.
        rows: rows of one block; chosen by their bytes if None.
        keep: bool ``[N]``; blocks without any such row are not read.

    Yields:
        The first row of a block and its scores, float32 ``[Q, n]``; blocks in order.
    """
    size = store.layout.row_bytes
    rows = rows or max(1, BLOCK_BYTES // size)
    spans = [(first, min(first + rows, len(store))) for first in range(0, len(store), rows)]
    if keep is not None:
        spans = [span for span in spans if keep[slice(*span)].any()]
    factors = row_factors(store, linear)
    queries = linear.queries.flatten(1).contiguous()

    def score(span: Span) -> tuple[int, Tensor]:
        scores = torch.empty(len(queries), span[1] - span[0])
        for first, decoded in decoded_rows(store, linear.readout, span, factors, len(queries)):
            place = slice(first - span[0], first - span[0] + len(decoded))
            if len(queries) == 1:
                torch.mv(decoded, queries[0], out=scores[0, place])
            else:
                scores[:, place] = queries @ decoded.T
        return span[0], scores

    yield from in_threads(score, spans)


def row_factors(
    store: Store, linear: Linear, rows: np.ndarray | slice = slice(None)
) -> Tensor | None:
    """Return what stored rows are multiplied by, float32 ``[n, D, T]``; None for nothing."""
    scales = store.scales(linear.readout)
    parts = [] if scales is None else [torch.from_numpy(scales[rows])]
    if linear.scale == "unit":
        lengths = torch.from_numpy(store.lengths(linear.readout)[rows])
        parts.append(1 / lengths.clamp(min=1e-12))
    elif linear.scale == "norm":
        norms = torch.from_numpy(store.norms(linear.readout)[rows])
        parts.append(norms.square().sum(-1).sqrt())
    return torch.stack(parts).prod(0) if parts else None


def decoded_rows(
    store: Store, readout: str, span: Span, factors: Tensor | None, queries: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Yield consecutive rows of a span, scaled, float32 ``[n, D·T·G·k]``, with the first's number.

    What is yielded is overwritten by the next.
    """
    width = int(np.prod(store.layout.row_shape))
    # For many queries the product is what takes time, and it wants more rows at once.
    most = max(1, BUFFER_BYTES // (4 * width), min(queries, 256))
    buffer = torch.empty(min(most, span[1] - span[0]), *store.layout.row_shape)
    first = span[0]
    for run in store.stored(readout, *span):
        for part in as_tensor(run, store.layout.dtype).split(len(buffer)):
            rows = buffer[: len(part)]
            rows.copy_(part)
            if factors is not None:
                rows.mul_(factors[first : first + len(part), :, :, None, None])
            yield first, rows.view(len(part), width)
            first += len(part)


def gathered_rows(store: Store, linear: Linear, rows: np.ndarray) -> Tensor:
    """Return chosen rows, scaled, float32 ``[n, D, T, G, k]``."""
    chosen = as_tensor(store.gather(linear.readout, rows), store.layout.dtype).float()
    factors = row_factors(store, linear, rows)
    return chosen if factors is None else chosen.mul_(factors[..., None, None])


def as_tensor(stored: np.ndarray, dtype: str) -> Tensor:
    """Return stored features as a tensor of their type; int8 is still to be scaled."""
    if dtype == "bfloat16":
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)


def in_threads(work: Callable[[In], Out], items: Sequence[In]) -> Iterator[Out]:
    """Yield the results in order; a few items are worked on ahead, each by one thread of torch.

    Meanwhile the caller has one thread of torch as well: the cores are taken.
    """
    threads = min(torch.get_num_threads(), len(items))
    with _threads_of_one(threads) as pool:
        if pool is None:
            yield from map(work, items)
            return
        waiting: deque[Future[Out]] = deque()
        rest = iter(items)
        waiting.extend(pool.submit(work, item) for item in islice(rest, 2 * threads))
        try:
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in islice(rest, 1))
                yield done
        finally:
            for each in waiting:
                each.cancel()


@contextmanager
def _threads_of_one(count: int) -> Iterator[ThreadPoolExecutor | None]:
    """Give threads in which torch does not start threads of its own; none where one is enough."""
    before = torch.get_num_threads()
    all_set = Barrier(count + 1)

    def settle() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread takes the number over when it is first asked for
        all_set.wait()

    torch.set_num_threads(1)
    try:
        if count <= 1:
            yield None
            return
        with ThreadPoolExecutor(count, initializer=settle) as pool:
            for _ in range(count):
                pool.submit(int)
            all_set.wait()
            yield pool
    finally:
        torch.set_num_threads(before)
