"""Loops that form per-example gradients in registers and fold them while they are in the cache.

A weight gradient is a sum of outer products ``Σ_p d_p ⊗ a_p``. Both sides are packed into panels
that the processor reads in sequence: :data:`ROWS` output gradients, :data:`COLUMNS` inputs. Their
product stays in registers (:func:`_tile`) and is folded before it leaves the cache, so that no
gradient is ever written to memory.

A 3 × 3 convolution is formed in the domain of Toom and Cook (Winograd 1980; Lavin & Gray, arXiv
1509.09308): each 4 × 4 tile of output gradients costs 36 multiplications instead of 144 for the 9
entries of a kernel. The points 0, ±√½, ±√2, ∞ keep the error of single precision within three
times that of the plain sum.

Everything is single precision; :class:`~dmin.sketches.base.FormedSketch` has the same in torch.
The module is imported when first needed: it compiles once and is cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_FEATURES = llvm.get_host_cpu_features()
# Lanes of a vector, and the product that fills the registers with accumulators.
WIDTH, ROWS, VECTORS = (
    (16, 12, 2) if _FEATURES.get("avx512f") else (8, 6, 2) if _FEATURES.get("avx2") else (4, 8, 2)
)
COLUMNS = VECTORS * WIDTH
WORD = 32  # signs in a hashed word

_inlined: Callable[[Callable], Any] = njit(
    nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"}
)


def _jit(function: Callable) -> Any:
    """Compile a function when it is first called; keep it on disk where there is a place."""
    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **settings)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return njit(**settings)(function)


def _generated(function: Callable) -> Any:
    """Make a function of what another writes as LLVM's intermediate code."""
    return intrinsic(function)


_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, WIDTH)
_pointer = types.CPointer(types.float32)


def _number(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _load(builder: Any, base: Any, offset: Any) -> Any:
    """Load a vector at base + offset (in floats), aligned or not."""
    place = builder.bitcast(builder.gep(base, [offset]), _VECTOR.as_pointer())
    return builder.load(place, align=4)


def _store(builder: Any, value: Any, base: Any, offset: Any) -> None:
    place = builder.bitcast(builder.gep(base, [offset]), _VECTOR.as_pointer())
    builder.store(value, place, align=4)


def _spread(builder: Any, scalar: Any) -> Any:
    """Return a vector of one number."""
    first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, WIDTH), [ir.Constant(_I32, 0)] * WIDTH)
    return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), zeros)


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    contract = ("contract",)
    return builder.fadd(builder.fmul(x, y, flags=contract), z, flags=contract)


@_generated
def _at(typing: Any, array: Any, offset: Any) -> Any:
    """Return the address of an array's element, counted in memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return _pointer(array, types.intp), generate


@_generated
def _tile(
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

    d is contiguous; a row of a is COLUMNS floats, consecutive ones a_inner or a_outer apart.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        d, a, outer, inner, a_outer, a_inner, c, c_row = args
        zero = ir.Constant(_VECTOR, [ir.Constant(_F32, 0.0)] * WIDTH)
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
def _add_signed(typing: Any, total: Any, x: Any, word: Any) -> Any:
    """``total[i] ± x[i]`` for the 32 signs of a word, bit 0 first; a set bit is a minus."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, x, word = args
        bits = builder.bitcast(word, ir.VectorType(ir.IntType(1), WORD))
        for first in range(0, WORD, WIDTH):
            lanes = [ir.Constant(_I32, first + lane) for lane in range(WIDTH)]
            mask = builder.shuffle_vector(
                bits, bits, ir.Constant(ir.VectorType(_I32, WIDTH), lanes)
            )
            value = _load(builder, x, _number(first))
            before = _load(builder, total, _number(first))
            after = builder.select(mask, builder.fsub(before, value), builder.fadd(before, value))
            _store(builder, after, total, _number(first))
        return context.get_dummy_value()

    return types.void(_pointer, _pointer, types.uint32), generate


@_generated
def _square(typing: Any, x: Any, count: Any) -> Any:
    """``Σ x[i]²`` of whole words, at least one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, count = args
        zero = ir.Constant(_VECTOR, [ir.Constant(_F32, 0.0)] * WIDTH)
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
def _transpose(typing: Any, x: Any, x_row: Any, y: Any, y_row: Any) -> Any:
    """``y[j, i] = x[i, j]`` for WIDTH × WIDTH floats; rows are x_row and y_row apart."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, x_row, y, y_row = args
        rows = [_load(builder, x, builder.mul(x_row, _number(i))) for i in range(WIDTH)]
        distance = 1
        while distance < WIDTH:  # exchange what is off the diagonal in squares of 2, 4, 8, …
            for i in (i for i in range(WIDTH) if not i & distance):
                pair = rows[i], rows[i + distance]
                for row, shift in ((i, 0), (i + distance, distance)):
                    lanes = [
                        lane - distance + shift + WIDTH if lane & distance else lane + shift
                        for lane in range(WIDTH)
                    ]
                    mask = ir.Constant(
                        ir.VectorType(_I32, WIDTH), [ir.Constant(_I32, lane) for lane in lanes]
                    )
                    rows[row] = builder.shuffle_vector(*pair, mask)
            distance *= 2
        for i, row in enumerate(rows):
            _store(builder, row, y, builder.mul(y_row, _number(i)))
        return context.get_dummy_value()

    i = types.intp
    return types.void(_pointer, i, _pointer, i), generate


def _sandwich(left: np.ndarray) -> Callable:
    """Return an intrinsic that computes ``L X Lᵀ`` for a constant L, lane by lane.

    Args:
        left: L.
    """
    rows, size = left.shape

    def combine(builder: Any, weights: np.ndarray, values: list) -> Any:
        total = None
        for weight, value in zip(weights, values, strict=True):
            if weight == 0:
                continue
            factor = ir.Constant(_VECTOR, [ir.Constant(_F32, float(np.float32(weight)))] * WIDTH)
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


def toom_cook(points: list[float], outputs: int, taps: int) -> tuple[np.ndarray, ...]:
    """Return A, G, B with ``Σ_t d[t] a[i + t] = (Aᵀ [(G d) ∘ (B a)])[i]`` for i < outputs.

    Args:
        points: where the polynomials are evaluated, outputs + taps − 2 of them; ∞ is added.
        outputs: length of the result.
        taps: length of d.
    """
    size = outputs + taps - 1
    inverse = np.zeros((outputs, size))
    inverse[:, :-1] = np.power.outer(points, np.arange(outputs)).T
    inverse[-1, -1] = 1
    first = np.zeros((size, taps))
    first[:-1] = np.power.outer(points, np.arange(taps))
    first[-1, -1] = 1
    # B is what makes it true for every pair of unit vectors.
    products = np.einsum("ix,xt->itx", inverse, first).reshape(-1, size)
    wanted = np.zeros((outputs, taps, size))
    for i in range(outputs):
        for t in range(taps):
            wanted[i, t, i + t] = 1
    second = np.linalg.lstsq(products, wanted.reshape(-1, size), rcond=None)[0]
    second[np.abs(second) < 1e-12] = 0
    return inverse, first, second


TILE = 4  # output gradients on a side
_POINTS = TILE + 2
PRODUCTS = _POINTS * _POINTS
_INVERSE, _FIRST, _SECOND = toom_cook([0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)], 3, TILE)
_to_kernel, _of_gradient, _of_input = map(_sandwich, (_INVERSE, _FIRST, _SECOND))
# Multiplications of one entry at which transforming costs as much as it saves, as measured.
TRANSFORM_COST = 200


@_inlined
def _finalise(word):  # type: ignore[no-untyped-def]
    # Numba widens a product of 32-bit numbers, so each step is cut back.
    word = np.uint32((word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    word = np.uint32((word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(word ^ (word >> np.uint32(16)))


@_inlined
def _hash(counter, key):  # type: ignore[no-untyped-def]
    """:func:`dmin.sketches.hashing.hash_words` of one counter."""
    word = _finalise(np.uint32(counter) ^ np.uint32(key))
    return _finalise(np.uint32(word + np.uint32(key)))


@_jit
def hashed_map(
    sign: int, words: int, offset: int, blocks: int, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of signs and the offsets of blocks, in [0, k), of a block-cyclic map."""
    bits, places = np.empty(words, np.uint32), np.empty(blocks, np.int32)
    for i in range(words):
        bits[i] = _hash(i, sign)
    for i in range(blocks):
        places[i] = _hash(i, offset) % np.uint32(dim)
    return bits, places


@_jit
def pack(x: np.ndarray, top: int, left: int, out: np.ndarray) -> None:
    """Lay out channels × pixels in panels of channels, with a border of zeros.

    Args:
        x: ``[channels, height, width]``, contiguous.
        top: rows of zeros above.
        left: columns of zeros before.
        out: ``[panels, height', width', panel]``, zeros, with WIDTH more floats behind it in
            memory. What does not fit in is not needed.
    """
    channels, panel = x.shape[0], out.shape[3]
    height, width = min(x.shape[1], out.shape[1] - top), min(x.shape[2], out.shape[2] - left)
    # A vector that overlaps the next pixel spoils it, until that is written in its turn.
    fits = panel % WIDTH == 0 or (top + height, left + width) == out.shape[1:3]
    for p in range(out.shape[0]):
        for first in range(p * panel, min((p + 1) * panel, channels), WIDTH):
            lane = first - p * panel
            count = min(panel - lane, channels - first, WIDTH)
            whole = width // WIDTH * WIDTH if fits and first + WIDTH <= channels else 0
            for i in range(height):
                source = (first * x.shape[1] + i) * x.shape[2]
                target = ((p * out.shape[1] + top + i) * out.shape[2] + left) * panel + lane
                for j in range(0, whole, WIDTH):
                    _transpose(
                        _at(x, source + j),
                        x.shape[1] * x.shape[2],
                        _at(out, target + j * panel),
                        panel,
                    )
                for c in range(count):
                    for j in range(whole, width):
                        out[p, top + i, left + j, lane + c] = x[first + c, i, j]


@_jit
def pack_rows(x: np.ndarray, out: np.ndarray) -> None:
    """Lay out positions × channels (contiguous) in panels ``[panels, positions, panel]``."""
    positions, channels = x.shape
    panel = out.shape[2]
    for p in range(out.shape[0]):
        first = p * panel
        count = min(panel, channels - first)
        for i in range(positions):
            for c in range(count):
                out[p, i, c] = x[i, first + c]


@_jit
def transform_gradient(d: np.ndarray, out: np.ndarray) -> None:
    """Transform each 4 × 4 tile of packed output gradients.

    Args:
        d: ``[panels, 4·tiles, 4·tiles', ROWS]``, with WIDTH more floats behind it in memory.
        out: ``[panels, 36, tiles·tiles' + 1, ROWS]``, likewise; the last tile is scratch.
    """
    panels, height, width, _ = d.shape
    down, across = height // TILE, width // TILE
    tiles = down * across + 1
    for p in range(panels):
        for i in range(down):
            for j in range(across):
                # Lanes beyond a panel are overwritten by the tile that comes after.
                for lane in range(0, ROWS, WIDTH):
                    source = ((p * height + TILE * i) * width + TILE * j) * ROWS + lane
                    target = (p * PRODUCTS * tiles + i * across + j) * ROWS + lane
                    _of_gradient(
                        _at(d, source),
                        width * ROWS,
                        ROWS,
                        _at(out, target),
                        _POINTS * tiles * ROWS,
                        tiles * ROWS,
                    )


@_jit
def transform_input(a: np.ndarray, out: np.ndarray) -> None:
    """Transform each 6 × 6 tile of packed inputs; tiles overlap by two.

    Args:
        a: ``[panels, 4·tiles + 2, 4·tiles' + 2, COLUMNS]``.
        out: ``[panels, 36, tiles·tiles', COLUMNS]``.
    """
    panels, height, width, _ = a.shape
    down, across = height // TILE, width // TILE
    tiles = down * across
    for p in range(panels):
        for i in range(down):
            for j in range(across):
                for lane in range(0, COLUMNS, WIDTH):
                    source = ((p * height + TILE * i) * width + TILE * j) * COLUMNS + lane
                    target = (p * PRODUCTS * tiles + i * across + j) * COLUMNS + lane
                    _of_input(
                        _at(a, source),
                        width * COLUMNS,
                        COLUMNS,
                        _at(out, target),
                        _POINTS * tiles * COLUMNS,
                        tiles * COLUMNS,
                    )


class Fold(NamedTuple):
    """The map of one parameter, seen as a matrix for each tap of a kernel; or of one tap.

    Block-cyclic: signs from ``words[row, column // 32]``, places from ``offsets[row, column //
    block]``, where a row is that of all taps. TensorSketch, if block is 0: the sums of a row's and
    a column's place, the products of their signs, where a column is that of all taps.
    """

    words: np.ndarray  # uint32 [rows · words in a row]
    offsets: np.ndarray  # int32 [rows · blocks in a row]
    block: int
    length: int  # of a folded row: k and what buckets count on beyond it
    row: np.ndarray  # int32 [out]
    row_sign: np.ndarray  # float32 [out]
    column: np.ndarray  # int32 [taps · in]
    column_sign: np.ndarray  # float32 [taps · in]


@_inlined
def _fold_row(x, at, width, out, o, tap, fold, total):  # type: ignore[no-untyped-def]
    """Fold one row of a gradient, ``x[at : at + width]``, with zeros up to a whole word."""
    if fold.block == 0:
        place, sign = fold.row[o], fold.row_sign[o]
        for c in range(width):
            j = tap * width + c
            total[place + fold.column[j]] += sign * fold.column_sign[j] * x[at + c]
        return
    row, block = tap * out + o, fold.block
    blocks, words = -(-width // block), -(-width // WORD)
    if block % WORD:
        for c in range(width):
            word = fold.words[row * words + c // WORD]
            place = fold.offsets[row * blocks + c // block] + c % block
            minus = (word >> np.uint32(c % WORD)) & np.uint32(1)
            total[place] += -x[at + c] if minus else x[at + c]
        return
    for b in range(blocks):
        place = fold.offsets[row * blocks + b] - b * block
        for first in range(b * block, min(width, (b + 1) * block), WORD):
            word = fold.words[row * words + first // WORD]
            _add_signed(_at(total, place + first), _at(x, at + first), word)


@_jit
def fold_formed(  # type: ignore[no-untyped-def]
    gradient, fold, total, squares, measure
):
    """Fold the formed gradients of some examples.

    Args:
        gradient: ``[examples, taps, out, in]``, any strides.
        fold: the map.
        total: ``[examples, fold.length]``, where they are added.
        squares: ``[examples]``, to which squared norms are added.
        measure: whether they are.
    """
    examples, taps, out, width = gradient.shape
    row = np.zeros(-(-width // WORD) * WORD, np.float32)
    for example in range(examples):
        for tap in range(taps):
            for o in range(out):
                for c in range(width):
                    row[c] = gradient[example, tap, o, c]
                _fold_row(row, 0, width, out, o, tap, fold, total[example])
                if measure:
                    squares[example] += _square(_at(row, 0), len(row))


@_jit
def wrap(total: np.ndarray, rows: np.ndarray) -> None:
    """Add parts ``[examples, parts, length]`` to rows ``[examples, k]``; past k is from 0 again."""
    examples, parts, length = total.shape
    dim = rows.shape[1]
    for example in range(examples):
        for part in range(parts):
            for j in range(min(dim, length)):
                rows[example, j] += total[example, part, j]
            for j in range(dim, length):
                rows[example, j - dim] += total[example, part, j]


class Walk(NamedTuple):
    """How the inputs of a layer lie under its output positions, in packed pixels."""

    lines: int  # of output positions
    length: int  # positions in a line
    line_step: int  # pixels from a line to the next
    step: int  # pixels from a position to the next
    starts: np.ndarray  # int64 [taps], pixel under the first position


@_jit
def form_and_fold(  # type: ignore[no-untyped-def]
    d, a, walk, out, width, fold, first, last, total, measure
):
    """Form rows of one example's gradient and fold them.

    Args:
        d: output gradients ``[panels, positions, ROWS]``.
        a: inputs ``[panels, pixels, COLUMNS]``.
        walk: which input lies under which position, for each tap.
        out: rows of the gradient.
        width: columns of the gradient.
        fold: the map.
        first: first panel of rows to do.
        last: the panel after the last.
        total: ``[fold.length]``, where they are added.
        measure: whether to return the squared norm.
    """
    panels, pixels, _ = a.shape
    positions = d.shape[1]
    padded = -(-width // WORD) * WORD
    piece = np.zeros(ROWS * padded, np.float32)
    square = 0.0
    for p in range(first, last):
        for tap in range(len(walk.starts)):
            for q in range(panels):
                _tile(
                    _at(d, p * positions * ROWS),
                    _at(a, (q * pixels + walk.starts[tap]) * COLUMNS),
                    walk.lines,
                    walk.length,
                    walk.line_step * COLUMNS,
                    walk.step * COLUMNS,
                    _at(piece, q * COLUMNS),
                    padded,
                )
            for r in range(min(ROWS, out - p * ROWS)):
                _fold_row(piece, r * padded, width, out, p * ROWS + r, tap, fold, total)
                if measure:
                    square += _square(_at(piece, r * padded), padded)
    return square


@_jit
def form_transformed_and_fold(  # type: ignore[no-untyped-def]
    d, a, out, width, fold, first, last, total, measure
):
    """Form rows of a 3 × 3 kernel's gradient from transformed tiles and fold them.

    Args:
        d: from :func:`transform_gradient`.
        a: from :func:`transform_input`.
        out: as for :func:`form_and_fold`, like the rest.
        width: columns of the gradient for one tap.
        fold: the map.
        first: first panel of rows to do.
        last: the panel after the last.
        total: where the sketch is added.
        measure: whether to return the squared norm.
    """
    panels, _, tiles, _ = a.shape
    padded = -(-width // WORD) * WORD
    products = np.empty(PRODUCTS * ROWS * COLUMNS, np.float32)
    piece = np.zeros(9 * ROWS * padded, np.float32)
    square = 0.0
    for p in range(first, last):
        for q in range(panels):
            for k in range(PRODUCTS):
                _tile(
                    _at(d, (p * PRODUCTS + k) * (tiles + 1) * ROWS),
                    _at(a, (q * PRODUCTS + k) * tiles * COLUMNS),
                    1,
                    tiles,
                    0,
                    COLUMNS,
                    _at(products, k * ROWS * COLUMNS),
                    COLUMNS,
                )
            for lane in range(0, ROWS * COLUMNS, WIDTH):
                r, c = lane // COLUMNS, lane % COLUMNS
                _to_kernel(
                    _at(products, lane),
                    _POINTS * ROWS * COLUMNS,
                    ROWS * COLUMNS,
                    _at(piece, r * padded + q * COLUMNS + c),
                    3 * ROWS * padded,
                    ROWS * padded,
                )
        rows = min(ROWS, out - p * ROWS)
        for tap in range(9):
            for r in range(rows):
                at = (tap * ROWS + r) * padded
                _fold_row(piece, at, width, out, p * ROWS + r, tap, fold, total)
                if measure:
                    square += _square(_at(piece, at), padded)
    return square


@_jit
def fold_tokens(  # type: ignore[no-untyped-def]
    d, a, walk, out, width, fold, total, squares, measure
):
    """Pack, form and fold some examples' outer products, ``[examples, positions, channels]``.

    Args:
        d: output gradients.
        a: inputs.
        walk: as for :func:`form_and_fold`, like the rest.
        out: rows of the gradient.
        width: columns of the gradient.
        fold: the map.
        total: ``[examples, fold.length]``, where they are added.
        squares: ``[examples]``, likewise.
        measure: whether squared norms are wanted.
    """
    positions = d.shape[1]
    panels_d, panels_a = -(-out // ROWS), -(-width // COLUMNS)
    packed_d = np.zeros((panels_d, positions, ROWS), np.float32)
    packed_a = np.zeros((panels_a, positions, COLUMNS), np.float32)
    for e in range(len(d)):
        pack_rows(d[e], packed_d)
        pack_rows(a[e], packed_a)
        squares[e] += form_and_fold(
            packed_d, packed_a, walk, out, width, fold, 0, panels_d, total[e], measure
        )


@_jit
def fold_planes(  # type: ignore[no-untyped-def]
    d, a, padding, d_size, a_size, transforms, walk, out, width, fold, total, squares, measure
):
    """Pack, form and fold some examples' correlations, ``[examples, channels, height, width]``.

    Args:
        d: output gradients.
        a: inputs.
        padding: zeros above and before the inputs.
        d_size: height and width of the packed output gradients.
        a_size: height and width of the packed inputs.
        transforms: whether they are formed from transformed tiles.
        walk: as for :func:`fold_tokens`, like the rest.
        out: rows of the gradient.
        width: columns of the gradient for one tap.
        fold: the map.
        total: ``[examples, fold.length]``, where they are added.
        squares: ``[examples]``, likewise.
        measure: whether squared norms are wanted.
    """
    panels_d, panels_a = -(-out // ROWS), -(-width // COLUMNS)
    pixels_d, pixels_a = d_size[0] * d_size[1], a_size[0] * a_size[1]
    flat_d = np.zeros(panels_d * pixels_d * ROWS + WIDTH, np.float32)
    flat_a = np.zeros(panels_a * pixels_a * COLUMNS + WIDTH, np.float32)
    packed_d = flat_d[:-WIDTH].reshape(panels_d, d_size[0], d_size[1], ROWS)
    packed_a = flat_a[:-WIDTH].reshape(panels_a, a_size[0], a_size[1], COLUMNS)
    tiles = pixels_d // (TILE * TILE) if transforms else 0
    size = panels_d * PRODUCTS * (tiles + 1) * ROWS
    flat_t = np.zeros(size + WIDTH if transforms else WIDTH + 1, np.float32)
    tiles_a = np.empty((panels_a, PRODUCTS, tiles, COLUMNS), np.float32)
    for e in range(len(d)):
        pack(d[e], 0, 0, packed_d)
        pack(a[e], padding[0], padding[1], packed_a)
        if transforms:
            tiles_d = flat_t[:size].reshape(panels_d, PRODUCTS, tiles + 1, ROWS)
            transform_gradient(packed_d, tiles_d)
            transform_input(packed_a, tiles_a)
            squares[e] += form_transformed_and_fold(
                tiles_d, tiles_a, out, width, fold, 0, panels_d, total[e], measure
            )
        else:
            squares[e] += form_and_fold(
                packed_d.reshape(panels_d, pixels_d, ROWS),
                packed_a.reshape(panels_a, pixels_a, COLUMNS),
                walk,
                out,
                width,
                fold,
                0,
                panels_d,
                total[e],
                measure,
            )


@_jit
def scatter(x: np.ndarray, bucket: np.ndarray, sign: np.ndarray, total: np.ndarray) -> None:
    """Add ``sign · x`` at the buckets, whatever the map."""
    for i in range(len(x)):
        total[bucket[i]] += sign[i] * x[i]


@_jit
def count_sketch(  # type: ignore[no-untyped-def]
    x, walk, first, last, bucket, sign, out
):
    """Add up count sketches of what lies under some output positions.

    Args:
        x: ``[pixels, channels]``.
        walk: which pixels lie under which position.
        first: first position to do.
        last: the position after the last.
        bucket: int32 ``[taps · channels]``.
        sign: float32 ``[taps · channels]``.
        out: ``[last − first, k]``, zeros.
    """
    channels = x.shape[1]
    for p in range(first, last):
        under = (p // walk.length) * walk.line_step + (p % walk.length) * walk.step
        for tap in range(len(walk.starts)):
            pixel = under + walk.starts[tap]
            for c in range(channels):
                j = tap * channels + c
                out[p - first, bucket[j]] += sign[j] * x[pixel, c]


@_jit
def add_products(left: np.ndarray, right: np.ndarray, total: np.ndarray) -> None:
    """``total += Σ_p left[p] · right[p]`` for complex spectra ``[positions, k // 2 + 1]``."""
    for p in range(left.shape[0]):
        for j in range(left.shape[1]):
            total[j] += left[p, j] * right[p, j]
