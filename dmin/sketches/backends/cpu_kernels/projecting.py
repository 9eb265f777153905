"""Both sides of a layer's gradient projected to a few numbers, and then multiplied."""

from __future__ import annotations

import numpy as np

from dmin.sketches.backends.cpu_kernels.folding import hashed
from dmin.sketches.backends.cpu_kernels.packing import enough, pack
from dmin.sketches.backends.cpu_kernels.toom_cook import (
    POINTS,
    PRODUCTS,
    TILE,
    to_kernel,
    transform_gradient,
    transform_input,
)
from dmin.sketches.backends.cpu_kernels.vectors import (
    COLUMNS,
    ROWS,
    WIDTH,
    WORD,
    at,
    compiled,
    tile,
)

CHUNK = 16 * ROWS  # positions that are projected together


@compiled
def sign_words(key: int, count: int) -> np.ndarray:
    """Return the hashed words of so many signs."""
    words = np.empty(-(-count // WORD), np.uint32)
    for i in range(len(words)):
        words[i] = hashed(i, key)
    return words


@compiled
def sign_panel(  # type: ignore[no-untyped-def]
    words, first, share, scale, out
):
    """Write some rows of a matrix of signs side by side.

    Args:
        words: signs of the whole matrix ``[share, size]``, from :func:`sign_words`.
        first: first row to write.
        share: rows that there are; those beyond are zeros.
        scale: of the signs.
        out: ``[size, rows]``.
    """
    size, rows = out.shape
    count = min(rows, share - first)
    for j in range(size):
        for r in range(count):
            e = (first + r) * size + j
            bit = (words[e // WORD] >> np.uint32(e % WORD)) & np.uint32(1)
            out[j, r] = -scale if bit else scale
        for r in range(count, rows):
            out[j, r] = 0


@compiled
def add_placed(  # type: ignore[no-untyped-def]
    gradient, starts, keys, sizes, shares, rows
):
    """Add gradients of matrices whose sides have a sign and a place for each entry.

    Args:
        gradient: ``[examples, P]``, flattened matrices that lie side by side.
        starts: where each begins.
        keys: of signs and places of either side, uint32 ``[matrices, 2, 2]``.
        sizes: out and in, int64 ``[matrices, 2]``.
        shares: k₁ and k₂, likewise. A side not longer than its share is shifted as a whole.
        rows: ``[examples, k₁ · k₂]``.
    """
    for m in range(len(keys)):
        out, inside = sizes[m]
        lines, line_signs = _side(keys[m, 0], out, shares[m, 0])
        places, place_signs = _side(keys[m, 1], inside, shares[m, 1])
        for example in range(len(gradient)):
            for i in range(out):
                line, first = lines[i] * shares[m, 1], starts[m] + i * inside
                for j in range(inside):
                    x = gradient[example, first + j]
                    rows[example, line + places[j]] += line_signs[i] * place_signs[j] * x


@compiled
def _side(keys, size, share):  # type: ignore[no-untyped-def]
    """Return place and sign of each entry of a side; see :func:`add_placed`."""
    places, signs = np.empty(size, np.int64), np.empty(size, np.float32)
    for i in range(size):
        minus = (hashed(i // WORD, keys[0]) >> np.uint32(i % WORD)) & np.uint32(1)
        signs[i] = -1 if minus else 1
        place = i + np.int64(hashed(0, keys[1])) if size <= share else np.int64(hashed(i, keys[1]))
        places[i] = place % share
    return places, signs


@compiled
def _patches(  # type: ignore[no-untyped-def]
    x, walk, first, last, out
):
    """Lay out what lies under some positions: ``[panels, channels · taps, ROWS]``.

    Args:
        x: ``[channels, pixels]``.
        walk: which pixels lie under which position.
        first: first position.
        last: the position after the last; panels are filled with what lies under this one's
            predecessor.
        out: the panels.
    """
    taps, panels = len(walk.starts), len(out)
    under = np.empty(panels * ROWS, np.int64)
    for i in range(len(under)):
        q = min(first + i, last - 1)
        under[i] = (q // walk.length) * walk.line_step + (q % walk.length) * walk.step
    # Runs of four positions in a line of whole runs.
    runs = walk.step == 1 and walk.length % 4 == 0 and first % 4 == 0 and ROWS % 4 == 0
    whole = (last - first) // ROWS if runs else 0
    for p in range(panels):
        for c in range(x.shape[0]):
            for tap in range(taps):
                start, j = walk.starts[tap], c * taps + tap
                if p < whole:
                    for lane in range(0, ROWS, 4):
                        pixel = start + under[p * ROWS + lane]
                        out[p, j, lane] = x[c, pixel]
                        out[p, j, lane + 1] = x[c, pixel + 1]
                        out[p, j, lane + 2] = x[c, pixel + 2]
                        out[p, j, lane + 3] = x[c, pixel + 3]
                else:
                    for lane in range(ROWS):
                        out[p, j, lane] = x[c, start + under[p * ROWS + lane]]


@compiled
def _project(packed, matrix, out, first) -> None:  # type: ignore[no-untyped-def]
    """Multiply packed rows by a matrix.

    Args:
        packed: ``[panels, n, ROWS]``.
        matrix: ``[columns, n, COLUMNS]``.
        out: ``[columns, rows, COLUMNS]``.
        first: row of the result where they begin.
    """
    panels, n, _ = packed.shape
    for p in range(panels):
        for q in range(len(matrix)):
            tile(
                at(packed, p * n * ROWS),
                at(matrix, q * n * COLUMNS),
                1,
                n,
                0,
                COLUMNS,
                at(out, (q * out.shape[1] + first + p * ROWS) * COLUMNS),
                COLUMNS,
            )


@compiled
def _add_product(d, a, count, shares, total) -> None:  # type: ignore[no-untyped-def]
    """Add ``Σ_p d[p] ⊗ a[p]`` of projected rows.

    Args:
        d: ``[columns, positions, COLUMNS]``, k₁ numbers a position.
        a: likewise, k₂.
        count: positions that count.
        shares: k₁ and k₂.
        total: ``[k₁ · k₂]``.
    """
    positions = a.shape[1]
    turned = np.empty((count, ROWS), np.float32)
    product = np.empty((ROWS, COLUMNS), np.float32)
    for first in range(0, shares[0], ROWS):
        rows = min(ROWS, shares[0] - first)
        for p in range(count):
            for r in range(ROWS):
                k = first + min(r, rows - 1)
                turned[p, r] = d[k // COLUMNS, p, k % COLUMNS]
        for q in range(len(a)):
            tile(
                at(turned, 0),
                at(a, q * positions * COLUMNS),
                1,
                count,
                0,
                COLUMNS,
                at(product, 0),
                COLUMNS,
            )
            for r in range(rows):
                for c in range(min(COLUMNS, shares[1] - q * COLUMNS)):
                    total[(first + r) * shares[1] + q * COLUMNS + c] += product[r, c]


@compiled
def _add_positions(scratch, d, a, own, walk, which, left, right, shares, total) -> None:  # type: ignore[no-untyped-def]
    """Project and multiply some positions of one example, so many at once that they stay cached.

    Args:
        scratch: room for the packed positions of either side.
        d: output gradients: ``[positions, out]``, or ``[out, positions]`` with a walk through them.
        a: inputs, likewise.
        own: the walk through the output gradients; without starts where channels lie side by side.
        walk: likewise of the inputs.
        which: first position, and the one after the last.
        left: A by columns, ``[panels, out, COLUMNS]``.
        right: B likewise, ``[panels, in · taps, COLUMNS]``.
        shares: k₁ and k₂.
        total: ``[k₁ · k₂]``, to which the product is added.
    """
    most = min(CHUNK, which[1] - which[0])
    panels = -(-most // ROWS)
    left_sums = np.empty((len(left), panels * ROWS, COLUMNS), np.float32)
    right_sums = np.empty((len(right), panels * ROWS, COLUMNS), np.float32)
    for first in range(which[0], which[1], CHUNK):
        last = min(which[1], first + CHUNK)
        panels = -(-(last - first) // ROWS)
        for x, steps, matrix, sums in ((d, own, left, left_sums), (a, walk, right, right_sums)):
            n = matrix.shape[1]
            packed = scratch[: panels * n * ROWS].reshape(panels, n, ROWS)
            if len(steps.starts):
                _patches(x, steps, first, last, packed)
            else:
                some = x[first:last].reshape(last - first, 1, n)
                pack(some, 0, 0, packed.reshape(panels, 1, n, ROWS))
            _project(packed, matrix, sums, 0)
        _add_product(left_sums, right_sums, last - first, shares, total)


@compiled
def project(  # type: ignore[no-untyped-def]
    scratch, d, a, own, walk, which, left, right, shares, totals
):
    """Project and multiply some positions of some examples, by what lies under each.

    Args:
        scratch: memory to work in; if it is too small, other is allocated.
        d: ``[examples, …]`` as for :func:`_add_positions`, like the rest.
        a: likewise.
        own: the walk through the output gradients.
        walk: that through the inputs.
        which: first position, and the one after the last.
        left: A by columns.
        right: B by columns.
        shares: k₁ and k₂.
        totals: ``[examples, k₁ · k₂]``, to which the products are added.

    Returns:
        Floats of scratch that it takes.
    """
    rows = -(-min(CHUNK, which[1] - which[0]) // ROWS) * ROWS
    needed = rows * max(left.shape[1], right.shape[1]) + WIDTH
    scratch = enough(scratch, needed)
    scratch[:needed] = 0
    for e in range(len(d)):
        _add_positions(scratch, d[e], a[e], own, walk, which, left, right, shares, totals[e])
    return needed


@compiled
def project_transformed(  # type: ignore[no-untyped-def]
    scratch, d, a, padding, own, which, left, right, shares, totals
):
    """Project some examples' output gradients, form kernels of what is left, and project these.

    A 3 × 3 kernel of k₁ outputs is formed by Toom and Cook's products, as
    :func:`~forming.form_transformed_and_fold` does, and multiplied by B.

    Args:
        scratch: memory to work in; if it is too small, other is allocated.
        d: output gradients ``[examples, out, positions]`` of whole tiles.
        a: inputs ``[examples, in, height, width]``.
        padding: zeros above and before the inputs.
        own: the positions' walk through d.
        which: first panel of A to do, and the one after the last.
        left: A by columns, ``[panels, out, COLUMNS]``.
        right: B by columns, ``[panels', in · 9, ROWS]``.
        shares: k₁ and k₂.
        totals: ``[examples, k₁ · k₂]``, to which the products are added.

    Returns:
        Floats of scratch that it takes.
    """
    lines, length, channels = own.lines, own.length, a.shape[1]
    positions, tiles = lines * length, lines * length // (TILE * TILE)
    inputs, panels = -(-channels // ROWS), which[1] - which[0]
    matrix, width = left[which[0] : which[1]], left.shape[1]
    rows, some_rows = -(-positions // ROWS), min(CHUNK, positions) // ROWS + 1
    # What each takes; a vector that is longer than a panel reaches beyond its last.
    pixels = (lines + 2) * (length + 2) * ROWS
    sizes = (
        some_rows * width * ROWS,
        panels * rows * ROWS * COLUMNS,
        pixels + WIDTH,
        PRODUCTS * (tiles + 1) * ROWS + WIDTH,
        panels * PRODUCTS * (tiles + 1) * COLUMNS,
        panels * inputs * ROWS * 9 * COLUMNS,
    )
    needed = sum(sizes)
    scratch = enough(scratch, needed)
    places = np.zeros(7, np.int64)
    for i in range(6):
        places[i + 1] = places[i] + sizes[i]
    packed = scratch[: places[1]].reshape(some_rows, width, ROWS)
    sums = scratch[places[1] : places[2]].reshape(panels, rows * ROWS, COLUMNS)
    flat = scratch[places[2] : places[3]]
    flat[:] = 0
    packed_a = flat[:pixels].reshape(1, lines + 2, length + 2, ROWS)
    flat = scratch[places[3] : places[4]]
    tiles_a = flat[:-WIDTH].reshape(1, PRODUCTS, tiles + 1, ROWS)
    tiles_d = scratch[places[4] : places[5]].reshape(panels, PRODUCTS, tiles + 1, COLUMNS)
    kernel = scratch[places[5] : places[6]].reshape(panels, inputs, ROWS * 9, COLUMNS)
    product = np.empty((ROWS, COLUMNS), np.float32)
    for e in range(len(d)):
        for first in range(0, positions, CHUNK):
            last = min(positions, first + CHUNK)
            some = packed[: -(-(last - first) // ROWS)]
            _patches(d[e], own, first, last, some)
            _project(some, matrix, sums, first)
        for q in range(panels):
            plane = sums[q, :positions].reshape(1, lines, length, COLUMNS)
            transform_gradient(plane, tiles_d[q : q + 1])
        for p in range(inputs):  # one panel after the other, which stays in the cache
            if (p + 1) * ROWS > channels:
                packed_a[:] = 0
            pack(a[e, p * ROWS : p * ROWS + WIDTH], padding[0], padding[1], packed_a)
            transform_input(packed_a, tiles_a)
            for q in range(panels):
                _form_kernel(tiles_a[0], tiles_d[q], kernel[q, p])
        for q in range(panels):
            for p in range(len(right)):
                tile(
                    at(right, p * channels * 9 * ROWS),
                    at(kernel, q * inputs * 9 * ROWS * COLUMNS),
                    1,
                    channels * 9,
                    0,
                    COLUMNS,
                    at(product, 0),
                    COLUMNS,
                )
                first = (which[0] + q) * COLUMNS
                for c in range(min(COLUMNS, shares[0] - first)):
                    for r in range(min(ROWS, shares[1] - p * ROWS)):
                        totals[e, (first + c) * shares[1] + p * ROWS + r] += product[r, c]
    return needed


@compiled
def _form_kernel(a, d, kernel) -> None:  # type: ignore[no-untyped-def]
    """Form some rows of a kernel, all its places: ``[ROWS · 9, COLUMNS]``.

    Args:
        a: transformed inputs ``[36, tiles + 1, ROWS]``.
        d: transformed output gradients, projected, ``[36, tiles + 1, COLUMNS]``.
        kernel: the result.
    """
    tiles = a.shape[1] - 1
    products = np.empty((PRODUCTS, ROWS, COLUMNS), np.float32)
    for k in range(PRODUCTS):
        tile(
            at(a, k * (tiles + 1) * ROWS),
            at(d, k * (tiles + 1) * COLUMNS),
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
            at(kernel, r * 9 * COLUMNS + c),
            3 * COLUMNS,
            COLUMNS,
        )
