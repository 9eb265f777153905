"""Vector instructions for the CPU loops, written in LLVM IR."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from dmin.runtime import jit

_FEATURES = llvm.get_host_cpu_features()
# Lanes of a vector, and the size of the product whose accumulators fill the registers.
WIDTH, ROWS, VECTORS = (
    (16, 12, 2) if _FEATURES.get("avx512f") else (8, 6, 2) if _FEATURES.get("avx2") else (4, 8, 2)
)
COLUMNS = VECTORS * WIDTH
WORD = 32  # signs in a hashed word

compiled: Callable[[Callable], Any] = partial(jit.compiled, error_model="numpy")
inlined: Callable[[Callable], Any] = njit(
    nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}
)


# Turns a Python function that generates LLVM IR into one that Numba can call.
_generated: Callable[[Callable], Any] = intrinsic


_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, WIDTH)
_pointer = types.CPointer(types.float32)


def _number(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _all(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [ir.Constant(_F32, value)] * WIDTH)


def _lanes(chosen: Iterable[int]) -> ir.Constant:
    """Return a shuffle mask: the source lane of each lane of the result."""
    return ir.Constant(ir.VectorType(_I32, WIDTH), [ir.Constant(_I32, lane) for lane in chosen])


def _vector(builder: Any, base: Any, offset: Any) -> Any:
    """Return the address of a vector at base + offset (in floats)."""
    return builder.bitcast(builder.gep(base, [offset]), _VECTOR.as_pointer())


def _load(builder: Any, base: Any, offset: Any) -> Any:
    """Load a vector, aligned or not."""
    return builder.load(_vector(builder, base, offset), align=4)


def _store(builder: Any, value: Any, base: Any, offset: Any) -> None:
    builder.store(value, _vector(builder, base, offset), align=4)


def _spread(builder: Any, scalar: Any) -> Any:
    """Return a vector with the same number in every lane."""
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), _lanes([0] * WIDTH))


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    contract = ("contract",)
    return builder.fadd(builder.fmul(x, y, flags=contract), z, flags=contract)


@_generated
def at(typing: Any, array: Any, offset: Any) -> Any:
    """Return the address of the element at a flat offset of a contiguous array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return _pointer(array, types.intp), generate


@_generated
def tile(
    typing: Any,
    d: Any,
    a: Any,
    outer: Any,
    inner: Any,
    a_outer: Any,
    a_inner: Any,
    c: Any,
    c_row: Any,
) -> Any:
    """``c[r, j] = Σ_yx d[y, x, r] a[y, x, j]`` for ROWS × COLUMNS entries, held in registers.

    d is contiguous. A row of a is COLUMNS floats; rows are a_inner (x) and a_outer (y) apart.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        d, a, outer, inner, a_outer, a_inner, c, c_row = args
        # Registers: ROWS × VECTORS sums (24 of AVX-512's 32), VECTORS of a, one entry of d in all
        # lanes. A step has ROWS + VECTORS loads for ROWS · VECTORS products. More sums would not
        # stay in registers. There are two loops because positions are lines of a padded image.
        zero = _all(0.0)
        entry = builder.block
        line = builder.append_basic_block("line")
        step = builder.append_basic_block("step")
        next_line = builder.append_basic_block("next_line")
        end = builder.append_basic_block("end")
        builder.branch(line)

        builder.position_at_end(line)
        y, d_line, a_line = builder.phi(_I64), builder.phi(d.type), builder.phi(a.type)
        y.add_incoming(_number(0), entry)
        d_line.add_incoming(d, entry)
        a_line.add_incoming(a, entry)
        sums_line = [builder.phi(_VECTOR) for _ in range(ROWS * VECTORS)]
        for value in sums_line:
            value.add_incoming(zero, entry)
        builder.branch(step)

        builder.position_at_end(step)
        x, d_here, a_here = builder.phi(_I64), builder.phi(d.type), builder.phi(a.type)
        x.add_incoming(_number(0), line)
        d_here.add_incoming(d_line, line)
        a_here.add_incoming(a_line, line)
        sums = [builder.phi(_VECTOR) for _ in range(ROWS * VECTORS)]
        for value, start in zip(sums, sums_line, strict=True):
            value.add_incoming(start, line)
        columns = [_load(builder, a_here, _number(v * WIDTH)) for v in range(VECTORS)]
        new = []
        for r in range(ROWS):
            row = _spread(builder, builder.load(builder.gep(d_here, [_number(r)])))
            for v in range(VECTORS):
                new.append(_multiply_add(builder, row, columns[v], sums[r * VECTORS + v]))
        x_next = builder.add(x, _number(1))
        d_next = builder.gep(d_here, [_number(ROWS)])
        a_next = builder.gep(a_here, [a_inner])
        x.add_incoming(x_next, step)
        d_here.add_incoming(d_next, step)
        a_here.add_incoming(a_next, step)
        for value, following in zip(sums, new, strict=True):
            value.add_incoming(following, step)
        builder.cbranch(builder.icmp_signed("<", x_next, inner), step, next_line)

        builder.position_at_end(next_line)
        y_next = builder.add(y, _number(1))
        y.add_incoming(y_next, next_line)
        d_line.add_incoming(d_next, next_line)
        a_line.add_incoming(builder.gep(a_line, [a_outer]), next_line)
        for value, following in zip(sums_line, new, strict=True):
            value.add_incoming(following, next_line)
        builder.cbranch(builder.icmp_signed("<", y_next, outer), line, end)

        builder.position_at_end(end)
        for r in range(ROWS):
            for v in range(VECTORS):
                offset = builder.add(builder.mul(c_row, _number(r)), _number(v * WIDTH))
                _store(builder, new[r * VECTORS + v], c, offset)
        return context.get_dummy_value()

    i = types.intp
    return types.void(_pointer, _pointer, i, i, i, i, _pointer, i), generate


@_generated
def add_signed(typing: Any, total: Any, x: Any, word: Any) -> Any:
    """``total[i] ± x[i]`` for the 32 signs of a word, bit 0 first; a set bit means minus."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, x, word = args
        bits = builder.bitcast(word, ir.VectorType(ir.IntType(1), WORD))
        for first in range(0, WORD, WIDTH):
            mask = builder.shuffle_vector(bits, bits, _lanes(range(first, first + WIDTH)))
            value = _load(builder, x, _number(first))
            before = _load(builder, total, _number(first))
            after = builder.select(mask, builder.fsub(before, value), builder.fadd(before, value))
            _store(builder, after, total, _number(first))
        return context.get_dummy_value()

    return types.void(_pointer, _pointer, types.uint32), generate


@_generated
def square(typing: Any, x: Any, count: Any) -> Any:
    """``Σ x[i]²`` for i < count, a positive multiple of WORD."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, count = args
        # WORD // WIDTH independent sums, because an addition waits for the previous one to its sum.
        zero = _all(0.0)
        entry, step = builder.block, builder.append_basic_block("step")
        end = builder.append_basic_block("end")
        builder.branch(step)
        builder.position_at_end(step)
        i = builder.phi(_I64)
        i.add_incoming(_number(0), entry)
        sums = [builder.phi(_VECTOR) for _ in range(WORD // WIDTH)]
        new = []
        for part, total in enumerate(sums):
            value = _load(builder, x, builder.add(i, _number(part * WIDTH)))
            new.append(_multiply_add(builder, value, value, total))
            total.add_incoming(zero, entry)
            total.add_incoming(new[-1], step)
        i_next = builder.add(i, _number(WORD))
        i.add_incoming(i_next, step)
        builder.cbranch(builder.icmp_signed("<", i_next, count), step, end)
        builder.position_at_end(end)
        result = ir.Constant(_F32, 0.0)
        for following in new:
            for lane in range(WIDTH):
                element = builder.extract_element(following, ir.Constant(_I32, lane))
                result = builder.fadd(result, element, flags=("reassoc",))
        return result

    return types.float32(_pointer, types.intp), generate


@_generated
def transpose(typing: Any, x: Any, x_row: Any, y: Any, y_row: Any) -> Any:
    """``y[j, i] = x[i, j]`` for WIDTH × WIDTH floats; rows are x_row and y_row apart."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, x_row, y, y_row = args
        rows = [_load(builder, x, builder.mul(x_row, _number(i))) for i in range(WIDTH)]
        distance = 1
        while distance < WIDTH:  # exchange the off-diagonal halves of squares of side 2, 4, 8, …
            for i in (i for i in range(WIDTH) if not i & distance):
                pair = rows[i], rows[i + distance]
                for row, shift in ((i, 0), (i + distance, distance)):
                    lanes = [
                        lane - distance + shift + WIDTH if lane & distance else lane + shift
                        for lane in range(WIDTH)
                    ]
                    rows[row] = builder.shuffle_vector(*pair, _lanes(lanes))
            distance *= 2
        for i, row in enumerate(rows):
            _store(builder, row, y, builder.mul(y_row, _number(i)))
        return context.get_dummy_value()

    i = types.intp
    return types.void(_pointer, i, _pointer, i), generate


def sandwich(left: np.ndarray) -> Callable:
    """Return an intrinsic that computes ``L X Lᵀ`` for a constant L, for each lane.

    Args:
        left: L.
    """
    rows, size = left.shape

    def combine(builder: Any, weights: np.ndarray, values: list) -> Any:
        total = None
        for weight, value in zip(weights, values, strict=True):
            if weight == 0:
                continue
            factor = _all(float(np.float32(weight)))
            if total is None:
                total = value if weight == 1 else builder.fmul(value, factor)
            elif weight == 1:
                total = builder.fadd(total, value)
            else:
                total = _multiply_add(builder, value, factor, total)
        return total

    @_generated
    def sandwich(
        typing: Any, x: Any, x_row: Any, x_column: Any, y: Any, y_row: Any, y_column: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_row, x_column, y, y_row, y_column = args

            def place(row: Any, i: int, column: Any, j: int) -> Any:
                return builder.add(builder.mul(row, _number(i)), builder.mul(column, _number(j)))

            # A vector holds one entry of X for WIDTH channels. L is constant, so its zeros and
            # ones are free. X is read by columns, so that the registers need to hold only L X.
            halfway = []  # L X, one column of X after the other
            for j in range(size):
                column = [_load(builder, x, place(x_row, i, x_column, j)) for i in range(size)]
                halfway.append([combine(builder, left[i], column) for i in range(rows)])
            for i in range(rows):
                row = [halfway[j][i] for j in range(size)]
                for j in range(rows):
                    value = combine(builder, left[j], row)
                    _store(builder, value, y, place(y_row, i, y_column, j))
            return context.get_dummy_value()

        i = types.intp
        return types.void(_pointer, i, i, _pointer, i, i), generate

    return sandwich
