"""Weight gradients formed in registers, and folded while they are in the cache."""

from typing import NamedTuple

import numpy as np

from dmin.sketches.backends.cpu_kernels.folding import fold_rows, wrap
from dmin.sketches.backends.cpu_kernels.packing import enough, pack, pack_rows
from dmin.sketches.backends.cpu_kernels.toom_cook import (
    POINTS,
    PRODUCTS,
    TILE,
    to_kernel,
    transform,
)
from dmin.sketches.backends.cpu_kernels.vectors import (
    COLUMNS,
    ROWS,
    WIDTH,
    WORD,
    at,
    compiled,
    square,
    tile,
)


class Walk(NamedTuple):
    """Which packed input pixels the output positions of a layer read."""

    lines: int  # number of lines of output positions
    length: int  # positions in a line
    line_step: int  # pixels from a line to the next
    step: int  # pixels from a position to the next
    starts: np.ndarray  # int64 [taps], pixel that the first position reads


@compiled
def form_and_fold(  # type: ignore[no-untyped-def]
    d, a, walk, out, width, fold, first, last, total, measure
):
    """Form rows of one example's gradient and fold them.

    Args:
        d: output gradients ``[panels, positions, ROWS]``.
        a: inputs ``[panels, pixels, COLUMNS]``.
        walk: which pixels each position reads, for each tap.
        out: rows of the gradient.
        width: columns of the gradient.
        fold: the map.
        first: the first panel of rows.
        last: one past the last panel of rows.
        total: ``[fold.length]``, to which the rows are added.
        measure: whether to return the squared norm.
    """
    panels, pixels, _ = a.shape
    positions = d.shape[1]
    # piece: ROWS rows of the gradient for one tap, each padded with zeros to whole words of signs.
    # It takes a few kB: it is folded from the cache, where the panel of d stays for the next tap.
    padded = -(-width // WORD) * WORD
    piece = np.zeros(ROWS * padded, np.float32)
    norm = 0.0
    for p in range(first, last):
        for tap in range(len(walk.starts)):
            for q in range(panels):
                tile(
                    at(d, p * positions * ROWS),
                    at(a, (q * pixels + walk.starts[tap]) * COLUMNS),
                    walk.lines,
                    walk.length,
                    walk.line_step * COLUMNS,
                    walk.step * COLUMNS,
                    at(piece, q * COLUMNS),
                    padded,
                )
            count = min(ROWS, out - p * ROWS)
            fold_rows(piece, 0, padded, count, width, out, p * ROWS, tap, fold, total)
            if measure:
                norm += square(at(piece, 0), count * padded)
    return norm


@compiled
def form_transformed_and_fold(  # type: ignore[no-untyped-def]
    d, a, out, width, fold, first, last, total, measure
):
    """Form rows of a 3 × 3 kernel's gradient from transformed tiles and fold them.

    Args:
        d: output gradients from :func:`transform`.
        a: inputs from :func:`transform`.
        out: rows of the gradient for one tap.
        width: columns of the gradient for one tap.
        fold: the map.
        first: the first panel of rows.
        last: one past the last panel of rows.
        total: ``[fold.length]``, to which the rows are added.
        measure: whether to return the squared norm.
    """
    panels, tiles = len(a), a.shape[2] - 1
    # products: [36, ROWS, COLUMNS], of one panel by one panel; piece: [9, ROWS, padded]. The 36
    # products are first summed over all tiles, by 36 small matrix products. The inverse transform,
    # which gives all taps, is then applied once instead of once per tile.
    padded = -(-width // WORD) * WORD
    products = np.empty(PRODUCTS * ROWS * COLUMNS, np.float32)
    piece = np.zeros(9 * ROWS * padded, np.float32)
    norm = 0.0
    for p in range(first, last):
        for q in range(panels):
            for k in range(PRODUCTS):
                tile(
                    at(d, (p * PRODUCTS + k) * (tiles + 1) * ROWS),
                    at(a, (q * PRODUCTS + k) * (tiles + 1) * COLUMNS),
                    1,
                    tiles,
                    0,
                    COLUMNS,
                    at(products, k * ROWS * COLUMNS),
                    COLUMNS,
                )
            for lane in range(0, ROWS * COLUMNS, WIDTH):
                r, c = lane // COLUMNS, lane % COLUMNS
                to_kernel(
                    at(products, lane),
                    POINTS * ROWS * COLUMNS,
                    ROWS * COLUMNS,
                    at(piece, r * padded + q * COLUMNS + c),
                    3 * ROWS * padded,
                    ROWS * padded,
                )
        count = min(ROWS, out - p * ROWS)
        for tap in range(9):
            place = tap * ROWS * padded
            fold_rows(piece, place, padded, count, width, out, p * ROWS, tap, fold, total)
            if measure:
                norm += square(at(piece, place), count * padded)
    return norm


@compiled
def fold_tokens(  # type: ignore[no-untyped-def]
    scratch, d, a, walk, out, width, fold, rows, squares, measure
):
    """Pack, form and fold some examples' outer products, ``[examples, positions, channels]``.

    Args:
        scratch: float32 working memory; if it is too small, memory is allocated.
        d: output gradients.
        a: inputs.
        walk: which pixels each position reads, for each tap.
        out: rows of the gradient.
        width: columns of the gradient.
        fold: the map.
        rows: ``[examples, k]``, to which folded gradients are added.
        squares: ``[examples]``, to which squared norms are added if ``measure``.
        measure: whether to add squared norms.

    Returns:
        The number of floats of scratch that are needed.
    """
    positions = d.shape[1]
    panels_d, panels_a = -(-out // ROWS), -(-width // COLUMNS)
    size_d, size_a = panels_d * positions * ROWS, panels_a * positions * COLUMNS
    scratch = enough(scratch, size_d + size_a)
    scratch[: size_d + size_a] = 0
    packed_d = scratch[:size_d].reshape(panels_d, positions, ROWS)
    packed_a = scratch[size_d : size_d + size_a].reshape(panels_a, positions, COLUMNS)
    total = np.empty(fold.length, np.float32)
    for e in range(len(d)):
        total[:] = 0
        pack_rows(d[e], packed_d)
        pack_rows(a[e], packed_a)
        squares[e] += form_and_fold(
            packed_d, packed_a, walk, out, width, fold, 0, panels_d, total, measure
        )
        wrap(total, rows[e])
    return size_d + size_a


@compiled
def fold_planes(  # type: ignore[no-untyped-def]
    scratch,
    d,
    a,
    padding,
    d_size,
    a_size,
    transforms,
    walk,
    out,
    width,
    fold,
    rows,
    squares,
    measure,
):
    """Pack, form and fold some examples' correlations, ``[examples, channels, height, width]``.

    Args:
        scratch: float32 working memory; if it is too small, memory is allocated.
        d: output gradients.
        a: inputs.
        padding: zeros above the inputs and on their left.
        d_size: height and width of the packed output gradients.
        a_size: height and width of the packed inputs.
        transforms: whether gradients are formed from transformed tiles.
        walk: which pixels each position reads, for each tap.
        out: rows of the gradient for one tap.
        width: columns of the gradient for one tap.
        fold: the map.
        rows: ``[examples, k]``, to which folded gradients are added.
        squares: ``[examples]``, to which squared norms are added if ``measure``.
        measure: whether to add squared norms.

    Returns:
        The number of floats of scratch that are needed.
    """
    panels_d, panels_a = -(-out // ROWS), -(-width // COLUMNS)
    pixels_d, pixels_a = d_size[0] * d_size[1], a_size[0] * a_size[1]
    tiles = pixels_d // (TILE * TILE) if transforms else 0
    size_d, size_a = panels_d * pixels_d * ROWS, panels_a * pixels_a * COLUMNS
    size_td = panels_d * PRODUCTS * (tiles + 1) * ROWS if transforms else 0
    size_ta = panels_a * PRODUCTS * (tiles + 1) * COLUMNS if transforms else 0
    # scratch: packed d and a, then both transformed. Behind each is one vector of slack, because a
    # vector longer than a panel is written beyond the end.
    start_a = size_d + WIDTH
    start_td = start_a + size_a + WIDTH
    start_ta = start_td + size_td + WIDTH
    needed = start_ta + size_ta
    scratch = enough(scratch, needed)
    scratch[:start_td] = 0
    packed_d = scratch[:size_d].reshape(panels_d, d_size[0], d_size[1], ROWS)
    packed_a = scratch[start_a : start_a + size_a].reshape(panels_a, a_size[0], a_size[1], COLUMNS)
    total = np.empty(fold.length, np.float32)
    for e in range(len(d)):
        total[:] = 0
        pack(d[e], 0, 0, packed_d)
        pack(a[e], padding[0], padding[1], packed_a)
        if transforms:
            tiles_d = scratch[start_td : start_td + size_td].reshape(
                panels_d, PRODUCTS, tiles + 1, ROWS
            )
            tiles_a = scratch[start_ta:needed].reshape(panels_a, PRODUCTS, tiles + 1, COLUMNS)
            transform(packed_d, tiles_d, False)
            transform(packed_a, tiles_a, True)
            squares[e] += form_transformed_and_fold(
                tiles_d, tiles_a, out, width, fold, 0, panels_d, total, measure
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
                total,
                measure,
            )
        wrap(total, rows[e])
    return needed
