"""Fold formed gradients to k dimensions: signs, buckets and additions."""

from typing import NamedTuple

import numpy as np

from dmin.sketches.backends.cpu_kernels.vectors import (
    WORD,
    add_signed,
    at,
    compiled,
    inlined,
    square,
)


@inlined
def _finalise(word):  # type: ignore[no-untyped-def]
    # Numba widens a product of 32-bit integers, so each step is cast back.
    word = np.uint32((word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    word = np.uint32((word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(word ^ (word >> np.uint32(16)))


@inlined
def hashed(counter, key):  # type: ignore[no-untyped-def]
    """Return the word of :func:`dmin.sketches.hashing.hash_words` for one counter."""
    word = _finalise(np.uint32(counter) ^ np.uint32(key))
    return _finalise(np.uint32(word + np.uint32(key)))


@compiled
def hashed_map(
    sign: int, words: int, offset: int, blocks: int, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sign words and the block offsets, in [0, k), of a block-cyclic map."""
    bits, places = np.empty(words, np.uint32), np.empty(blocks, np.int32)
    for i in range(words):
        bits[i] = hashed(i, sign)
    for i in range(blocks):
        places[i] = hashed(i, offset) % np.uint32(dim)
    return bits, places


class Fold(NamedTuple):
    """The map of one parameter, viewed as one matrix per tap of its kernel.

    Block-cyclic: signs are in ``words[row, column // 32]``, blocks start at ``offsets[row, column
    // block]``; rows are numbered over all taps. TensorSketch, if ``block`` is 0: sums of a row's
    and a column's bucket, products of their signs; columns are numbered over all taps.
    """

    words: np.ndarray  # uint32 [rows · words per row]
    offsets: np.ndarray  # int32 [rows · blocks per row]
    block: int
    length: int  # of a folded row before `wrap`: k plus the largest overrun
    row: np.ndarray  # int32 [out]
    row_sign: np.ndarray  # float32 [out]
    column: np.ndarray  # int32 [taps · in]
    column_sign: np.ndarray  # float32 [taps · in]


@inlined
def fold_rows(x, start, step, count, width, out, o, tap, fold, total):  # type: ignore[no-untyped-def]
    """Fold rows o, o + 1, … of a gradient for one tap; several per call, to save calls.

    Args:
        x: memory of the rows, each with zeros after its ``width`` entries up to a whole word.
        start: position of the first row in x.
        step: distance between rows in x.
        count: number of rows.
        width: entries of a row.
        out: rows per tap.
        o: number of the first row.
        tap: number of the tap.
        fold: the map.
        total: ``[fold.length]``, to which the rows are added.
    """
    # total is longer than k, so that no remainder modulo k is needed per entry, neither for blocks
    # that run past the last bucket nor for sums of two buckets; `wrap` adds the rest at the end.
    if fold.block == 0:
        for r in range(count):
            place, sign = fold.row[o + r], fold.row_sign[o + r]
            for c in range(width):
                j = tap * width + c
                total[place + fold.column[j]] += (
                    sign * fold.column_sign[j] * x[start + r * step + c]
                )
        return
    block, row = fold.block, tap * out + o
    blocks, words = -(-width // block), -(-width // WORD)
    if block % WORD:  # the signs of a block may start within a word: entry by entry
        for r in range(count):
            for c in range(width):
                word = fold.words[(row + r) * words + c // WORD]
                place = fold.offsets[(row + r) * blocks + c // block] + c % block
                minus = (word >> np.uint32(c % WORD)) & np.uint32(1)
                value = x[start + r * step + c]
                total[place] += -value if minus else value
        return
    # Whole words: WORD entries are contiguous both in x and in total, and are added as vectors.
    for r in range(count):
        for b in range(blocks):
            place = fold.offsets[(row + r) * blocks + b] - b * block
            for first in range(b * block, min(width, (b + 1) * block), WORD):
                word = fold.words[(row + r) * words + first // WORD]
                add_signed(at(total, place + first), at(x, start + r * step + first), word)


@inlined
def wrap(total, row):  # type: ignore[no-untyped-def]
    """Add a total, which is longer than k, to a row of k dimensions; entry k + i goes to i."""
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
        rows: ``[examples, k]``, to which folded gradients are added.
        squares: ``[examples]``, to which squared norms are added if ``measure``.
        measure: whether to add squared norms.
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
                fold_rows(row, 0, 0, 1, width, out, o, tap, fold, total)
                if measure:
                    squares[example] += square(at(row, 0), len(row))
        wrap(total, rows[example])


@compiled
def fold_vectors(  # type: ignore[no-untyped-def]
    gradient, starts, keys, block, rows, squares, measure
):
    """Fold concatenated gradients of vectors by block-cyclic maps, which are hashed meanwhile.

    Args:
        gradient: ``[examples, P]``.
        starts: start of each vector, and end of the last, ``[vectors + 1]``.
        keys: keys of each vector's signs and offsets, uint32 ``[vectors, 2]``.
        block: b.
        rows: ``[examples, k]``, to which folded gradients are added.
        squares: ``[examples]``, to which squared norms are added if ``measure``.
        measure: whether to add squared norms.
    """
    examples, dim = rows.shape
    sign = np.empty(block, np.float32)
    for v in range(len(keys)):
        start, width = starts[v], starts[v + 1] - starts[v]
        for first in range(0, width, block):
            place = np.int64(hashed(first // block, keys[v, 1]) % np.uint32(dim))
            count = min(block, width - first)
            for i in range(count):
                if i == 0 or (first + i) % WORD == 0:
                    word = hashed((first + i) // WORD, keys[v, 0])
                minus = (word >> np.uint32((first + i) % WORD)) & np.uint32(1)
                sign[i] = -1 if minus else 1
            before = min(count, dim - place)
            for example in range(examples):
                x, row = gradient[example, start + first : start + first + count], rows[example]
                for i in range(before):
                    row[place + i] += sign[i] * x[i]
                for i in range(before, count):
                    row[place + i - dim] += sign[i] * x[i]
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
    """Add ``sign · x`` at the given buckets, for any map."""
    for i in range(len(x)):
        total[bucket[i]] += sign[i] * x[i]
