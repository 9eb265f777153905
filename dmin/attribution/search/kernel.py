"""The compiled loops of the exact scan: decode, check and multiply, reading each number once.

What is stored (float16, bfloat16, int8, float32) is converted in a register just before the
product; decoded values are never written to memory. The same loop adds up the words of every row
and compares the sum with the checksum noted when the row's segment was verified: a score is never
computed from a flipped bit.

A tile of a few rows by a few queries is multiplied at a time, with the
sums in registers. A compiler would vectorise such a loop, but in an order of its own, and not
together with prefetching. Written in LLVM IR (:func:`products`), every product is added up by the
same instructions in the same order, so that scores do not depend on blocks, threads and other
queries; and the next rows are prefetched, which hides the latency of memory.

The error of a score is bounded. A lane of a register adds up every LANES-th of COLUMNS products;
these sums, some of them joined with their neighbours, are inner products of at most :data:`SHORT`
numbers in float32, with an error of at most ``SHORT · 2⁻²⁴ / (1 − …)`` of ``Σ |x| |y|``, in any
order of summation (Higham 2002, Accuracy and Stability of Numerical Algorithms, 3.1). Everything
after that is double. Longer sums in float32 would hardly be faster, as registers are added up once
in COLUMNS columns, and would have a much weaker bound.

numba has no half floats: float16 is passed as int16 and bfloat16 as uint16, which tells
them apart. numba is imported with this module, when a scan begins. (All loops are in one file,
as numba invalidates its cache by the file of a loop.)
"""

# mypy: ignore-errors
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from dmin.runtime.jit import compiled

WIDE = bool(get_host_cpu_features().get("avx512f"))
LANES = 16 if WIDE else 8  # float32 in a vector
ROWS, QUERIES = 4, 4 if WIDE else 2  # whose sums are in registers at a time
# What is added up without a break. Of more queries, the numbers of TILE rows in COLUMNS columns
# stay in the second cache while TOGETHER queries pass, a few of which stay in the first.
TILE, COLUMNS, TOGETHER = 32, 1024, 64
SHORT = COLUMNS // 8  # products at most that are added up in float32, by the fewest lanes there are
LINE, AHEAD = 64, 2048  # bytes that memory gives at a time, and how far ahead rows are fetched
SMALLEST = 1e-12  # length that a row is divided by
INT, FLOAT, HALF, DOUBLE = ir.IntType(32), ir.FloatType(), ir.HalfType(), ir.DoubleType()
FUSED = ("contract",)


def _widened(builder: Any, stored: Any, value: Any, shape: Callable[[Any], Any]) -> Any:
    """Return stored numbers as float32; ``shape`` turns a type into a vector type, or not."""
    if stored == types.int16:  # vcvtph2ps
        return builder.fpext(builder.bitcast(value, shape(HALF)), shape(FLOAT))
    if stored == types.uint16:
        bits = builder.zext(value, shape(INT))
        return builder.bitcast(
            builder.shl(bits, ir.Constant(shape(INT), _filled(shape, 16))), shape(FLOAT)
        )
    if stored == types.int8:
        return builder.sitofp(value, shape(FLOAT))
    return value


def _filled(shape: Callable[[Any], Any], value: int) -> Any:
    kind = shape(INT)
    return [value] * kind.count if isinstance(kind, ir.VectorType) else value


def _words(builder: Any, stored: Any, value: Any, shape: Callable[[Any], Any]) -> Any:
    """Return the bits of stored numbers as uint32."""
    if stored == types.float32:
        return builder.bitcast(value, shape(INT))
    return builder.zext(value, shape(INT))


def _of_one(kind: Any, write: Callable[..., Any]) -> Any:
    """Derive the scalar function from the code generator for vectors."""

    @intrinsic
    def generated(typing: Any, stored: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return write(builder, stored, arguments[0], lambda kind: kind)

        return kind(stored), generate

    return generated


widen: Any = _of_one(types.float32, _widened)  # a stored number as float32
word: Any = _of_one(types.uint32, _words)  # its bits as uint32


def products(queries: int, first: bool) -> Any:
    """Generate the innermost loop for a number of queries.

    Args:
        queries: multiplied at a time.
        first: the rows are read for the first time: also sum their words, and prefetch the next
            rows.

    Returns:
        A function of an array of the stored type; the addresses of four rows and of four to
        prefetch; the address of the first query, the stride in bytes, and the number of queries (if
        fewer, the last is repeated); and the length of the rows. It returns ``queries · 4``
        products, those of the first query first, and four sums of words.
    """

    @intrinsic
    def generated(
        typing: Any,
        like: Any,
        rows: Any,
        later: Any,
        query: Any,
        stride: Any,
        asked: Any,
        count: Any,
    ) -> Any:
        found = types.UniTuple(types.float64, queries * ROWS)
        words = types.UniTuple(types.uint32, ROWS)
        signature = types.Tuple((found, words))(like, rows, later, query, stride, asked, count)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, here, then, start, apart, there, number = arguments
            last = builder.sub(there, ir.Constant(there.type, 1))
            numbers = [ir.Constant(there.type, each) for each in range(queries)]
            numbers = [builder.select(builder.icmp_signed("<", n, last), n, last) for n in numbers]
            those = [builder.add(start, builder.mul(n, apart)) for n in numbers]
            here, then = (cgutils.unpack_tuple(builder, four) for four in (here, then))
            # Whole vectors, then number by number: no load reaches past a row.
            loop = _Loop(context, builder, like.dtype, here, those, then if first else [])
            step = ir.Constant(number.type, loop.step)
            whole = builder.sub(number, builder.urem(number, step))
            zero = ir.Constant(number.type, 0)
            most = loop.run(zero, whole, loop.step, LANES)
            rest = loop.run(whole, number, 1, 1)
            sums, bits = (
                [add(a, b) for a, b in zip(one, other, strict=True)]
                for one, other, add in zip(most, rest, (builder.fadd, builder.add), strict=True)
            )
            parts = (
                context.make_tuple(builder, found, sums),
                context.make_tuple(builder, words, bits),
            )
            return context.make_tuple(builder, signature.return_type, parts)

        return signature, generate

    return generated


class _Loop:
    """Generates the innermost loop: vectors, then single numbers for the remainder."""

    def __init__(
        self, context: Any, builder: Any, stored: Any, rows: Any, asked: Any, later: Any
    ) -> None:
        self.builder, self.stored = builder, stored
        self.rows, self.asked, self.later = rows, asked, later
        self.element = context.get_value_type(stored)
        self.size = stored.bitwidth // 8
        self.step = max(LANES, LINE // self.size)  # numbers: a line of every row is fetched a turn

    def run(self, start: Any, stop: Any, step: int, lanes: int) -> tuple[list[Any], list[Any]]:
        """Return products and word sums of the numbers from ``start`` to ``stop``."""
        builder = self.builder
        self.lanes = lanes
        count = len(self.rows) * len(self.asked)
        self.sums = [self._zero(FLOAT) for _ in range(count)]
        self.bits = [self._zero(INT) for _ in self.rows]
        stride = ir.Constant(start.type, step)
        with cgutils.for_range_slice(builder, start, stop, stride, start.type) as (index, _):
            for place in self.later if lanes > 1 else ():
                self._fetch(place, index)
            for offset in range(0, step, lanes):
                self._multiply(builder.add(index, ir.Constant(index.type, offset)))
        # Places of a register that are sums of fewer products are added up while they are float32.
        narrow = max(1, lanes * (COLUMNS // LANES) // SHORT)
        sums = [self._added(builder.load(each), builder.fadd, lanes, narrow) for each in self.sums]
        wide = [builder.fpext(each, ir.VectorType(DOUBLE, narrow)) for each in sums]
        nought = ir.Constant(INT, 0)
        totals = [self._added(each, builder.fadd, narrow) for each in wide]
        bits = [self._added(builder.load(each), builder.add, lanes) for each in self.bits]
        return tuple(
            [builder.extract_element(each, nought) for each in part] for part in (totals, bits)
        )

    def _shape(self, kind: Any) -> Any:
        return ir.VectorType(kind, self.lanes)

    def _zero(self, kind: Any) -> Any:
        shape = self._shape(kind)
        return cgutils.alloca_once_value(self.builder, ir.Constant(shape, [0] * self.lanes))

    def _pointer(self, address: Any, index: Any, size: int, kind: Any) -> Any:
        builder = self.builder
        offset = builder.mul(index, ir.Constant(index.type, size))
        return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

    def _load(self, address: Any, index: Any, size: int, kind: Any) -> Any:
        where = self._pointer(address, index, size, self._shape(kind))
        return self.builder.load(where, align=size)

    def _multiply(self, index: Any) -> None:
        builder, shape = self.builder, self._shape
        stored = [self._load(row, index, self.size, self.element) for row in self.rows]
        if self.later:
            for total, value in zip(self.bits, stored, strict=True):
                bits = _words(builder, self.stored, value, shape)
                builder.store(builder.add(builder.load(total), bits), total)
        wide = [_widened(builder, self.stored, value, shape) for value in stored]
        totals = iter(self.sums)
        for query in self.asked:
            asked = self._load(query, index, 4, FLOAT)
            for value in wide:
                total = next(totals)
                product = builder.fmul(value, asked, flags=FUSED)
                builder.store(builder.fadd(builder.load(total), product, flags=FUSED), total)

    def _fetch(self, address: Any, index: Any) -> None:
        builder = self.builder
        line = self._pointer(address, index, self.size, ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [line.type, INT, INT, INT])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(call, [line, *(ir.Constant(INT, value) for value in (0, 2, 1))])

    def _added(self, vector: Any, add: Any, lanes: int, left: int = 1) -> Any:
        """Sum a vector by adding halves until the given number is left."""
        while lanes > left:
            lanes //= 2
            low, high = (
                self.builder.shuffle_vector(
                    vector, vector, ir.Constant(ir.VectorType(INT, lanes), list(part))
                )
                for part in (range(lanes), range(lanes, 2 * lanes))
            )
            vector = add(low, high)
        return vector


_one_query = products(1, first=True)
_few_queries = products(QUERIES, first=True)
_more_queries = products(QUERIES, first=False)


@compiled
def multiplied(like: Any, addresses: Any, factors: Any, sums: Any, queries: Any, scores: Any):
    """Compute the scores of rows at any addresses; return the first with a wrong checksum, or −1.

    ``scores[q, i] = Σ_s factors[i, s] Σ_x queries[q, s, x] rows[i, s, x]``

    Args:
        like: an array of the stored type.
        addresses: uint64 ``[n]``, of the first number of each row of S·m contiguous numbers.
        factors: float32 ``[n, S]``, S draws and timesteps.
        sums: uint32 ``[n]``, the checksum of each row.
        queries: float32 ``[Q, S, m]``, C-contiguous.
        scores: float64 ``[Q, n]``, to be filled.
    """
    count, (asked, steps, width) = len(addresses), queries.shape
    # Outermost first: TOGETHER queries; TILE rows; COLUMNS columns of them, which then lie in the
    # second cache (int8 to float32: 32 to 128 kB); QUERIES queries, whose columns lie in the first;
    # ROWS rows, whose products with these are the registers of `products`. So of many queries
    # the store is read from memory once for TOGETHER of them. Of few, memory is the limit: then
    # rows are read from end to end, ROWS at a time.
    tile = ROWS if asked <= QUERIES else TILE
    scores[:] = 0
    seen = np.zeros(count, np.uint32)
    for start in range(0, asked, TOGETHER):
        those = range(start, min(start + TOGETHER, asked), QUERIES)
        for first in range(0, count, tile):
            for s in range(steps):
                for x in range(0, width, COLUMNS):
                    part = s, x, min(COLUMNS, width - x)
                    for q in those:
                        for i in range(first, min(first + tile, count), ROWS):
                            _add(like, addresses, factors, queries, q, i, part, scores, seen)
    for i in range(count):
        if seen[i] != sums[i]:
            return i
    return -1


@compiled
def _add(like, addresses, factors, queries, q, i, part, scores, seen):
    """Add the products of some columns of four rows with up to four queries."""
    (s, x, columns), (asked, steps, width) = part, queries.shape
    offset = np.uint64((s * width + x) * like.itemsize)
    rows, inside = _four(addresses, i, offset), min(ROWS, len(addresses) - i)
    query = queries.ctypes.data + np.uint64(((q * steps + s) * width + x) * queries.itemsize)
    stride = np.uint64(steps * width * queries.itemsize)
    size = np.uint64(steps * width * like.itemsize)
    # Of many queries the same rows stay: their next columns follow.
    ahead = offset + np.uint64(AHEAD if asked <= QUERIES else columns * like.itemsize)
    later = _four(addresses, i, ahead) if ahead < size else _four(addresses, i + ROWS, ahead - size)
    if asked == 1:
        found, words = _one_query(like, rows, later, query, stride, 1, columns)
        for r in range(inside):
            scores[0, i + r] += found[r] * factors[i + r, s]
            seen[i + r] += words[r]
        return
    if q == 0:
        found, words = _few_queries(like, rows, later, query, stride, asked, columns)
        for r in range(inside):
            seen[i + r] += words[r]
    else:
        found, words = _more_queries(like, rows, later, query, stride, asked - q, columns)
    for a in range(min(QUERIES, asked - q)):
        for r in range(inside):
            scores[q + a, i + r] += found[a * ROWS + r] * factors[i + r, s]


@compiled
def _four(addresses: Any, i: int, offset: Any) -> Any:
    """Return the addresses of four rows, repeating the last, so that all use the same code."""
    last = len(addresses) - 1
    return (
        addresses[min(i, last)] + offset,
        addresses[min(i + 1, last)] + offset,
        addresses[min(i + 2, last)] + offset,
        addresses[min(i + 3, last)] + offset,
    )


@compiled
def decoded(rows: Any, factors: Any, sums: Any, out: Any) -> int:
    """Fill ``out[i, s] = factors[i, s] rows[i, s]``, float32; result as above.

    Args:
        rows: ``[n, S, m]`` as stored.
        factors: float32 ``[n, S]``.
        sums: uint32 ``[n]``.
        out: float32 ``[n, S, m]``, to be filled.
    """
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


def _rescored(rows, scale, unit, query, scores):
    """Compute the scores of some rows by one query, summed in double.

    Args:
        rows: ``[n, S, P, m]`` as stored, P parts of S draws and timesteps.
        scale: float64 ``[n, S, P]``.
        unit: divide by the norm of all scaled parts, which is computed on the way.
        query: float32 ``[S, P, m]``.
        scores: float64 ``[n]``, to be filled.
    """
    count, steps, parts, width = rows.shape
    for i in range(count):
        total = 0.0
        for s in range(steps):
            product = square = 0.0
            for p in range(parts):
                stored, asked = rows[i, s, p], query[s, p]
                inside = length = 0.0
                for x in range(width):
                    value = np.float64(widen(stored[x]))
                    inside += value * asked[x]
                    length += value * value
                product += scale[i, s, p] * inside
                square += scale[i, s, p] * scale[i, s, p] * length
            total += product / max(np.sqrt(square), SMALLEST) if unit else product
        scores[i] = total


# Its sums may be cut into vectors, in one way for all rows: equal rows have equal scores.
rescored: Any = compiled(_rescored, fastmath={"reassoc", "contract"})
