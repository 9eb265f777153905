"""Signs, places and additions: formed gradients become k numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dmin.sketches.cpu_kernels.vectors import WORD, add_signed, at, compiled, inlined, square


@inlined
def _finalise(word):  # type: ignore[no-untyped-def]
    # Numba widens a product of 32-bit numbers, so each step is cut back.
    word = np.uint32((word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    word = np.uint32((word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(word ^ (word >> np.uint32(16)))


@inlined
def hashed(counter, key):  # type: ignore[no-untyped-def]
    """:func:`dmin.sketches.hashing.hash_words` of one counter."""
    word = _finalise(np.uint32(counter) ^ np.uint32(key))
    return _finalise(np.uint32(word + np.uint32(key)))


@compiled
def hashed_map(
    sign: int, words: int, offset: int, blocks: int, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of signs and the offsets of blocks, in [0, k), of a block-cyclic map."""
    bits, places = np.empty(words, np.uint32), np.empty(blocks, np.int32)
    for i in range(words):
        bits[i] = hashed(i, sign)
    for i in range(blocks):
        places[i] = hashed(i, offset) % np.uint32(dim)
    return bits, places


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


@inlined
def fold_row(x, start, width, out, o, tap, fold, total):  # type: ignore[no-untyped-def]
    """Fold one row of a gradient, ``x[start : start + width]``, with zeros up to a whole word."""
    if fold.block == 0:
        place, sign = fold.row[o], fold.row_sign[o]
        for c in range(width):
            j = tap * width + c
            total[place + fold.column[j]] += sign * fold.column_sign[j] * x[start + c]
        return
    row, block = tap * out + o, fold.block
    blocks, words = -(-width // block), -(-width // WORD)
    if block % WORD:
        for c in range(width):
            word = fold.words[row * words + c // WORD]
            place = fold.offsets[row * blocks + c // block] + c % block
            minus = (word >> np.uint32(c % WORD)) & np.uint32(1)
            total[place] += -x[start + c] if minus else x[start + c]
        return
    for b in range(blocks):
        place = fold.offsets[row * blocks + b] - b * block
        for first in range(b * block, min(width, (b + 1) * block), WORD):
            word = fold.words[row * words + first // WORD]
            add_signed(at(total, place + first), at(x, start + first), word)


@inlined
def wrap(total, row):  # type: ignore[no-untyped-def]
    """Add a total, which is longer than k, to a row of k numbers; past k is from 0 again."""
    dim = len(row)
    for j in range(min(dim, len(total))):
        row[j] += total[j]
    for j in range(dim, len(total)):
        row[j - dim] += total[j]


@compiled
def fold_formed(  # type: ignore[no-untyped-def]
    gradient, fold, rows, squares, measure
):
    """Fold the formed gradients of some examples.

    Args:
        gradient: ``[examples, taps, out, in]``, any strides.
        fold: the map.
        rows: ``[examples, k]``, to which they are added.
        squares: ``[examples]``, to which squared norms are added.
        measure: whether they are.
    """
    examples, taps, out, width = gradient.shape
    row = np.zeros(-(-width // WORD) * WORD, np.float32)
    total = np.empty(fold.length, np.float32)
    for example in range(examples):
        total[:] = 0
        for tap in range(taps):
            for o in range(out):
                for c in range(width):
                    row[c] = gradient[example, tap, o, c]
                fold_row(row, 0, width, out, o, tap, fold, total)
                if measure:
                    squares[example] += square(at(row, 0), len(row))
        wrap(total, rows[example])


@compiled
def fold_vectors(  # type: ignore[no-untyped-def]
    gradient, starts, keys, block, rows, squares, measure
):
    """Fold gradients of vectors that lie side by side by block-cyclic maps, hashed on the way.

    Args:
        gradient: ``[examples, P]``.
        starts: where each vector begins, and the end of the last.
        keys: of each vector's signs and offsets, uint32 ``[vectors, 2]``.
        block: b.
        rows: ``[examples, k]``, to which they are added.
        squares: ``[examples]``, to which squared norms are added.
        measure: whether they are.
    """
    examples, dim = rows.shape
    for v in range(len(keys)):
        start, width = starts[v], starts[v + 1] - starts[v]
        for first in range(0, width, block):
            place = hashed(first // block, keys[v, 1]) % np.uint32(dim)
            for c in range(first, min(width, first + block)):
                if c == first or c % WORD == 0:
                    word = hashed(c // WORD, keys[v, 0])
                minus = (word >> np.uint32(c % WORD)) & np.uint32(1)
                bucket = (np.int64(place) + c - first) % dim
                for example in range(examples):
                    x = gradient[example, start + c]
                    rows[example, bucket] += -x if minus else x
        if measure:
            for example in range(examples):
                norm = np.float32(0)
                for c in range(start, start + width):
                    norm += gradient[example, c] * gradient[example, c]
                squares[example] += norm


@compiled
def add_parts(total: np.ndarray, rows: np.ndarray) -> None:
    """Add parts ``[examples, parts, length]`` to rows ``[examples, k]``, in order."""
    for example in range(len(total)):
        for part in range(total.shape[1]):
            wrap(total[example, part], rows[example])


@compiled
def scatter(x: np.ndarray, bucket: np.ndarray, sign: np.ndarray, total: np.ndarray) -> None:
    """Add ``sign · x`` at the buckets, whatever the map."""
    for i in range(len(x)):
        total[bucket[i]] += sign[i] * x[i]
