"""The exact scan: every row of a store against all queries, at memory bandwidth.

Each thread scores whole blocks of rows, with as many threads as torch uses: threads that
synchronise in every small operation would lose most of their time on a busy machine. One loop
decodes, checks and multiplies (:mod:`dmin.attribution.search.kernel`): with few queries it is
limited by memory, with many by arithmetic. If the queries are on an accelerator, blocks are copied
there as stored.
"""

from collections.abc import Iterator, Sequence
from functools import cache, reduce
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.search.threads import in_threads
from dmin.store import Store
from dmin.store.encoding import STORED_AS, word_sums

BLOCK_BYTES = 64 << 20  # of stored rows: what one thread takes at a time
CHUNK_BYTES = 4 << 20  # of chosen rows: fewer are not worth a thread
BUFFER_BYTES = 4 << 20  # of decoded rows: what stays in the cache
MEMORY_BOUND = 8  # queries: more take longer than reading does, and blocks are smaller by that
PARTS = 32  # sums of float32 that a device keeps of one score at a time
SCORE_BYTES = 32 << 20  # of one block's scores: of very many queries it has fewer rows
# numba knows no half floats: float16 comes as int16, bfloat16 as uint16, distinguished by that.
SEEN_AS = {
    "float32": "<f4",
    "float16": "<i2",
    "bfloat16": "<u2",
    "int8": "|i1",
    "int8_parts": "|i1",
}
Span = tuple[int, int]


def scan(
    linear: InnerProduct, store: Store, rows: int | None = None, keep: np.ndarray | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Score all rows of a store.

    Args:
        linear: the queries.
        store: the rows.
        rows: rows of one block; chosen by their bytes if None.
        keep: bool ``[N]``; blocks without allowed rows are not read.

    Yields:
        The first row of a block and its scores, float32 ``[Q, n]``; blocks in order.
    """
    count = len(linear.queries)
    size = max(CHUNK_BYTES, BLOCK_BYTES // max(1, count // MEMORY_BOUND))
    most = min(size // store.layout.row_bytes, SCORE_BYTES // (8 * count))
    rows = rows or _even(len(store), most)
    some = spans(len(store), rows)
    if keep is not None:
        some = [span for span in some if keep[slice(*span)].any()]
    queries = linear.queries.reshape(count, store.layout.steps, -1).float().contiguous()
    if queries.is_cuda:
        yield from _scan_there(linear, store, some, queries.flatten(1))
        return
    factors, asked = row_factors(store, linear), queries.numpy()

    def score(span: Span) -> tuple[int, Tensor]:
        scores = np.empty((len(asked), span[1] - span[0]))
        for first, stored, scale, sums in _parts(store, linear.readout, span, factors):
            out = scores[:, first - span[0] : first - span[0] + len(stored)]
            wrong = multiply(stored, scale, sums, asked, out)
            _require_sound(store, linear.readout, first, wrong)
        return span[0], torch.from_numpy(scores).float()

    yield from in_threads(score, some, compiled=True)


def multiply(
    rows: np.ndarray, scale: np.ndarray, sums: np.ndarray, queries: np.ndarray, scores: np.ndarray
) -> int:
    """Compute the scores ``[Q, n]`` of consecutive rows ``[n, S, m]``; see the kernel."""
    where = rows.ctypes.data + np.arange(len(rows), dtype=np.uint64) * np.uint64(rows[:1].nbytes)
    wrong: int = kernel().multiplied(rows[:0, 0, 0], where, scale, sums, queries, scores)
    return wrong


def _scan_there(
    linear: InnerProduct, store: Store, some: Sequence[Span], queries: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Score spans on the queries' device: decoded, scaled and multiplied there."""
    device = queries.device
    factors = row_factors(store, linear)
    for span in some:
        parts = []
        for first, stored, _, sums in _parts(store, linear.readout, span, None):
            last = first + len(stored)
            check = word_sums(stored.view(STORED_AS[store.layout.dtype])) == sums
            _require_sound(store, linear.readout, first, -1 if check.all() else int(check.argmin()))
            sent = as_tensor(stored, store.layout.dtype).pin_memory()
            rows = sent.to(device, non_blocking=True).float()
            if factors is not None:
                scale = factors[first:last].flatten(1).to(device, non_blocking=True)
                rows.mul_(scale[:, :, None])
            parts.append(_short_products(queries, rows.flatten(1)))
        yield span[0], torch.cat(parts, dim=1).cpu()


def _short_products(queries: Tensor, rows: Tensor) -> Tensor:
    """Return ``queries · rowsᵀ``; as in the kernel, only short sums are float32."""
    short = kernel().SHORT
    total = torch.zeros(len(queries), len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], PARTS * short):
        part = slice(start, start + PARTS * short)
        some, others = (_cut(each[:, part], short) for each in (queries, rows))
        total += torch.bmm(some, others.mT).sum(0, dtype=torch.float64)
    return total.float()


def _cut(rows: Tensor, width: int) -> Tensor:
    """Return rows ``[n, m]`` as ``[parts, n, width]``, zeros at the end."""
    missing = -rows.shape[1] % width
    return torch.nn.functional.pad(rows, (0, missing)).unflatten(1, (-1, width)).transpose(0, 1)


def _parts(
    store: Store, readout: str, span: Span, factors: Tensor | None
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the runs of a span in the form that the loops take.

    Yields:
        First row; ``[n, S, m]`` as stored, S draws, timesteps and parts with a scale of their own;
        factors float32 ``[n, S]``; sums uint32 ``[n]``.
    """
    steps, sums, first = store.layout.steps, store.sums(readout), span[0]
    for run in store.mapped.runs(readout, *span):
        last = first + len(run)
        if factors is None:
            scale = np.ones((len(run), steps), np.float32)
        else:
            scale = factors[first:last].flatten(1).numpy()
        seen = word_sums(run) if sums is None else sums[first:last]
        yield first, run.reshape(len(run), steps, -1).view(SEEN_AS[store.layout.dtype]), scale, seen
        first = last


def _require_sound(store: Store, readout: str, first: int, wrong: int) -> None:
    if wrong >= 0:
        raise store.corrupt(readout, first + wrong)


def spans(count: int, size: int) -> list[Span]:
    """Divide ``count`` rows into spans of ``size``; the last may be shorter."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _even(rows: int, most: int) -> int:
    """Return the rows of a block such that all threads have the same number of blocks."""
    threads = torch.get_num_threads()
    blocks = -(-rows // max(1, most))
    return max(1, -(-rows // max(1, blocks if blocks == 1 else -(-blocks // threads) * threads)))


@cache
def kernel() -> Any:
    """Return the loops, which are compiled at the first call and cached on disk if possible."""
    return import_module("dmin.attribution.search.kernel")


def row_factors(
    store: Store, linear: InnerProduct, rows: np.ndarray | slice = slice(None)
) -> Tensor | None:
    """Return the factors of stored rows, float32 ``[n, D, T, parts]``; None for nothing."""
    scales, own = stored_scales(store, linear, rows), lengthened(store, linear, rows)
    parts = [each for each in (scales, None if own is None else own[..., None]) if each is not None]
    return torch.from_numpy(reduce(np.multiply, parts).astype(np.float32)) if parts else None


def stored_scales(
    store: Store, linear: InnerProduct, rows: np.ndarray | slice
) -> np.ndarray | None:
    """Return the scales that rows are stored without, float64 ``[n, D, T, parts]``."""
    scales = store.scales(linear.readout)
    if scales is None:
        return None
    chosen = scales[rows].astype(np.float64)
    return chosen if chosen.ndim == 4 else chosen[..., None]


def lengthened(store: Store, linear: InnerProduct, rows: np.ndarray | slice) -> np.ndarray | None:
    """Return the factors that lengthen rows, float64 ``[n, D, T]``; None for nothing."""
    if linear.scale == "unit":
        return store.inverse_lengths(linear.readout)[rows].astype(np.float64)
    if linear.scale == "norm":
        norms = store.norms(linear.readout)[rows].astype(np.float64)
        return np.sqrt(np.square(norms).sum(-1))
    return None


def decoded_rows(
    store: Store, readout: str, span: Span, factors: Tensor | None, queries: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Yield consecutive rows of a span, scaled, float32 ``[n, D·T·G·k]``, with the first's number.

    The yielded buffer is reused.
    """
    width = int(np.prod(store.layout.row_shape))
    # For many queries the product is what takes time, and it wants more rows at once.
    most = max(1, BUFFER_BYTES // (4 * width), min(queries, 256))
    steps = store.layout.steps
    buffer = torch.empty(min(most, span[1] - span[0]), steps, width // steps)
    for first, stored, scale, sums in _parts(store, readout, span, factors):
        for start in range(0, len(stored), len(buffer)):
            part = slice(start, min(start + len(buffer), len(stored)))
            rows = buffer[: part.stop - start]
            wrong = kernel().decoded(stored[part], scale[part], sums[part], rows.numpy())
            _require_sound(store, readout, first + start, wrong)
            yield first + start, rows.flatten(1)


def scores_of_rows(
    store: Store,
    linear: InnerProduct,
    factors: Tensor | None,
    query: Tensor,
    rows: np.ndarray,
) -> Tensor:
    """Return a query's scores of chosen rows, float64 ``[n]``, or of several ``[Q, n]``.

    Rows are read in place. For the error of scores see :class:`ErrorBound`.

    Args:
        store: the rows.
        linear: for its readout.
        factors: of all rows, from :func:`row_factors`.
        query: ``[D·T·G·k]``, or several ``[Q, D·T·G·k]``.
        rows: which, ``[n]``.
    """
    steps = store.layout.steps
    readout, sums = linear.readout, store.sums(linear.readout)
    if sums is None:  # nothing was verified: there is nothing to hold rows against
        chosen = gathered_rows(store, linear, rows).flatten(1)
        return query.double() @ chosen.T.double()
    asked = query.reshape(query.shape[:-1].numel(), steps, -1).numpy()
    like = np.empty(0, SEEN_AS[store.layout.dtype])
    scores = torch.empty(len(asked), len(rows), dtype=torch.float64)

    def score(span: Span) -> None:
        part = rows[slice(*span)]
        where = store.mapped.addresses(readout, part)
        scale = (
            np.ones((len(part), steps), np.float32)
            if factors is None
            else factors[part].flatten(1).numpy()
        )
        out = scores[:, slice(*span)].numpy()
        wrong = kernel().multiplied(like, where, scale, sums[part], asked, out)
        if wrong >= 0:
            raise store.corrupt(readout, int(part[wrong]))

    size = _even(len(rows), max(64, CHUNK_BYTES // store.layout.row_bytes))
    for _ in in_threads(score, spans(len(rows), size), compiled=True):
        pass
    return scores if query.dim() > 1 else scores[0]


def gathered_rows(store: Store, linear: InnerProduct, rows: np.ndarray) -> Tensor:
    """Return chosen rows, scaled, float32 ``[n, D, T, G, k]``."""
    chosen = as_tensor(store.gather(linear.readout, rows), store.layout.dtype).float()
    if (factors := row_factors(store, linear, rows)) is None:
        return chosen
    cut = chosen.view(*factors.shape, -1) if len(rows) else chosen
    return (cut * factors[..., None]).view_as(chosen) if len(rows) else chosen


def as_tensor(stored: np.ndarray, dtype: str) -> Tensor:
    """Return stored features as a tensor of their type; int8 is not scaled yet."""
    if dtype == "bfloat16":
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)
