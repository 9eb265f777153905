"""The loops of an exact scan that no library has: decode, check, multiply, each number read once.

What is stored (float16, bfloat16, int8, float32) is widened in a register on its way into the
product; nothing decoded is ever written to memory. On the way the words of every row are added up
and held against the sum noted when the row's segment was verified: a score is never computed from
a flipped bit. Every row is worked on by the same instructions in the same order, whatever the block
it is in, so scores do not depend on blocks and threads.

numba knows no half floats: float16 comes as int16, bfloat16 as uint16. It is imported when this
module is, which is when a scan begins.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

# Sums may be reordered and fused, which is what lets them fill vectors; NaN and infinity stay.
FAST = {"reassoc", "contract", "nsz"}
ROWS, QUERIES = 4, 4  # in registers at a time: query numbers are loaded once for four rows


@intrinsic
def pointer(typing: Any, address: Any, like: Any) -> Any:
    """Return an address as a pointer to numbers of an array's type."""
    signature = types.CPointer(like.dtype)(address, like)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


def _loop(function: Any) -> Any:
    """Compile when first called, and keep that on disk where there is a place for it."""
    try:
        return njit(nogil=True, cache=True, fastmath=FAST)(function)
    except RuntimeError:  # neither this folder nor the user's own can be written
        return njit(nogil=True, fastmath=FAST)(function)


@intrinsic
def widen(typing: Any, stored: Any) -> Any:
    """Return a stored number as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if stored == types.int16:  # vcvtph2ps, a vector at a time
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if stored == types.uint16:
            bits = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(bits, ir.FloatType())
        if stored == types.int8:
            return builder.sitofp(value, ir.FloatType())
        return value

    return types.float32(stored), generate


@intrinsic
def word(typing: Any, stored: Any) -> Any:
    """Return the bits of a stored number as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if stored == types.float32:
            return builder.bitcast(value, ir.IntType(32))
        return builder.zext(value, ir.IntType(32))

    return types.uint32(stored), generate


@_loop
def few_queries(rows, factors, sums, queries, scores):
    """Fill the scores of a block; return the first row that is not what was sealed, or −1.

    ``scores[q, i] = Σ_s factors[i, s] Σ_x queries[q, s, x] rows[i, s, x]``

    Args:
        rows: ``[n, S, m]`` as stored, S draws and timesteps.
        factors: float32 ``[n, S]``.
        sums: uint32 ``[n]``, the words of each row added up.
        queries: float32 ``[Q, S, m]``.
        scores: float32 ``[Q, n]``, to be filled.
    """
    count, steps, _ = rows.shape
    asked, wrong = queries.shape[0], -1
    totals = np.empty((asked, ROWS), np.float32)
    seen = np.empty(ROWS, np.uint32)
    for first in range(0, count, ROWS):
        # At the end the last row is repeated: no row meets other instructions than the rest.
        i, j = first, min(first + 1, count - 1)
        k, m = min(first + 2, count - 1), min(first + 3, count - 1)
        totals[:] = 0
        seen[:] = 0
        for s in range(steps):
            four = rows[i, s], rows[j, s], rows[k, s], rows[m, s]
            scale = factors[i, s], factors[j, s], factors[k, s], factors[m, s]
            _first(four, scale, queries[0, s], totals[0], seen)
            for q in range(1, asked, QUERIES):
                _more(four, scale, queries, s, q, totals)
        for r in range(min(ROWS, count - first)):
            if wrong < 0 and seen[r] != sums[first + r]:
                wrong = first + r
            for q in range(asked):
                scores[q, first + r] = totals[q, r]
    return wrong


@_loop
def _first(rows, scale, query, totals, seen):
    """Add the products of four rows with one query, and the words of the rows."""
    i, j, k, m = rows
    a = b = c = d = np.float32(0)
    wi = wj = wk = wm = np.uint32(0)
    for x in range(len(query)):
        q = query[x]
        a += widen(i[x]) * q
        b += widen(j[x]) * q
        c += widen(k[x]) * q
        d += widen(m[x]) * q
        wi = np.uint32(wi + word(i[x]))
        wj = np.uint32(wj + word(j[x]))
        wk = np.uint32(wk + word(k[x]))
        wm = np.uint32(wm + word(m[x]))
    totals[0] += a * scale[0]
    totals[1] += b * scale[1]
    totals[2] += c * scale[2]
    totals[3] += d * scale[3]
    seen[0] += wi
    seen[1] += wj
    seen[2] += wk
    seen[3] += wm


@_loop
def _more(rows, scale, queries, s, first, totals):
    """Add the products of four rows with up to four more queries: 16 sums in registers."""
    i, j, k, m = rows
    last = len(queries) - 1
    e, f = queries[first, s], queries[min(first + 1, last), s]
    g, h = queries[min(first + 2, last), s], queries[min(first + 3, last), s]
    ie = je = ke = me = np.float32(0)
    if_ = jf = kf = mf = np.float32(0)
    ig = jg = kg = mg = np.float32(0)
    ih = jh = kh = mh = np.float32(0)
    for x in range(len(e)):
        vi, vj, vk, vm = widen(i[x]), widen(j[x]), widen(k[x]), widen(m[x])
        q = e[x]
        ie += vi * q
        je += vj * q
        ke += vk * q
        me += vm * q
        q = f[x]
        if_ += vi * q
        jf += vj * q
        kf += vk * q
        mf += vm * q
        q = g[x]
        ig += vi * q
        jg += vj * q
        kg += vk * q
        mg += vm * q
        q = h[x]
        ih += vi * q
        jh += vj * q
        kh += vk * q
        mh += vm * q
    sums = ((ie, je, ke, me), (if_, jf, kf, mf), (ig, jg, kg, mg), (ih, jh, kh, mh))
    for q in range(min(QUERIES, last + 1 - first)):
        for r in range(ROWS):
            totals[first + q, r] += sums[q][r] * scale[r]


@_loop
def chosen_rows(like, addresses, factors, sums, query, scores):
    """Fill the scores of rows wherever they lie; result as above.

    Args:
        like: an array of the type of what is stored.
        addresses: uint64 ``[n]``, of the first number of each row.
        factors: float32 ``[n, S]``.
        sums: uint32 ``[n]``.
        query: float32 ``[S, m]``.
        scores: float32 ``[n]``, to be filled.
    """
    count, (steps, width), wrong = len(addresses), query.shape, -1
    totals = np.empty(ROWS, np.float32)
    seen = np.empty(ROWS, np.uint32)
    size = np.uint64(width * like.itemsize)
    for first in range(0, count, ROWS):
        i, j = first, min(first + 1, count - 1)
        k, m = min(first + 2, count - 1), min(first + 3, count - 1)
        totals[:] = 0
        seen[:] = 0
        for s in range(steps):
            at = np.uint64(s) * size
            four = (
                carray(pointer(addresses[i] + at, like), width),
                carray(pointer(addresses[j] + at, like), width),
                carray(pointer(addresses[k] + at, like), width),
                carray(pointer(addresses[m] + at, like), width),
            )
            scale = factors[i, s], factors[j, s], factors[k, s], factors[m, s]
            _first(four, scale, query[s], totals, seen)
        for r in range(min(ROWS, count - first)):
            if wrong < 0 and seen[r] != sums[first + r]:
                wrong = first + r
            scores[first + r] = totals[r]
    return wrong


@_loop
def decoded(rows, factors, sums, out):
    """Fill ``out[i, s] = factors[i, s] rows[i, s]``, float32; arguments and result as above."""
    count, steps, width = rows.shape
    wrong = -1
    for i in range(count):
        seen = np.uint32(0)
        for s in range(steps):
            stored, scale, target = rows[i, s], factors[i, s], out[i, s]
            for x in range(width):
                target[x] = widen(stored[x]) * scale
                seen = np.uint32(seen + word(stored[x]))
        if wrong < 0 and seen != sums[i]:
            wrong = i
    return wrong
