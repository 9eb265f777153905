"""Triton kernels for a GPU: fold formed gradients, count-sketch factors, sum products of spectra.

Every output number is summed by one program, in an order fixed by the map, without atomic
operations, so that the same input gives the same bits. The torch path is their oracle; in
Triton's interpreter (``TRITON_INTERPRET=1``) they run on a CPU.
"""

# Triton interprets the annotations of its functions, so types of `typing` cannot be used here.
# mypy: disable-error-code="no-untyped-def, valid-type, operator, misc"
import triton
import triton.language as tl


@triton.jit
def _finalise(words):
    words = words ^ (words >> 16)
    words = words * 0x85EBCA6B
    words = words ^ (words >> 13)
    words = words * 0xC2B2AE35
    return words ^ (words >> 16)


# Triton would compile another version for arguments that are 1 or a multiple of 16: one suffices.
@triton.jit(do_not_specialize=["key", "count"])
def hash_words(key, words, count, TILE: tl.constexpr):
    """Write the hashed words of the counters 0 … count−1 (dmin.sketches.hashing.hash_words)."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    keyed = tl.full([TILE], 0, tl.uint32) + key.to(tl.uint32)
    hashed = _finalise(_finalise(place.to(tl.uint32) ^ keyed) + keyed)
    tl.store(words + place, hashed.to(tl.int32, bitcast=True), mask=place < count)


@triton.jit(
    do_not_specialize=[
        "examples",
        "dim",
        "outputs",
        "width",
        "blocks",
        "blocks_of_row",
        "words_of_row",
    ]
)
def fold_blocks(
    gradient,  # [examples, taps, outputs, inputs], with the strides below
    order,  # int32 [blocks]: blocks by ascending offset
    offset,  # int32 [blocks]: offsets, ascending
    first,  # int32 [tiles]: the first block in that order that overlaps a tile of buckets …
    count,  # int32 [tiles]: … and the number of blocks that do
    words,  # int32 [rows, words per row]: 32 signs each
    partial,  # float32 [examples, splits, dim]
    squares,  # float32 [examples, splits, tiles]
    examples,
    dim,
    outputs,
    width,
    blocks,
    blocks_of_row,
    words_of_row,
    stride_example,
    stride_tap,
    stride_output,
    stride_input,
    BLOCK: tl.constexpr,
    EXAMPLES: tl.constexpr,
    TILE: tl.constexpr,
    MEASURE: tl.constexpr,
):
    """Add the blocks that overlap one tile of buckets, and the squares of the entries added."""
    # Program (tile of buckets, split of the blocks that overlap it, group of EXAMPLES). Its total
    # is [EXAMPLES, TILE] in registers. A block's offset and signs are the same for all examples, so
    # they are read once per group. Sorted by offset, the blocks that overlap a tile are one run of
    # `order`, cyclically, so no search is needed. Splits fill a GPU if k has few tiles.
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    example = (tl.program_id(2) * EXAMPLES + tl.arange(0, EXAMPLES))[:, None]
    start, reaching = tl.load(first + tile), tl.load(count + tile).to(tl.int64)
    low = (reaching * split // splits).to(tl.int32)
    high = (reaching * (split + 1) // splits).to(tl.int32)
    bucket = (tile * TILE + tl.arange(0, TILE))[None, :]
    there = example < examples
    base = gradient + example.to(tl.int64) * stride_example
    total = tl.zeros([EXAMPLES, TILE], tl.float32)
    measured = tl.zeros([EXAMPLES, TILE], tl.float32)
    for place in range(low, high):
        number = start + place
        number = tl.where(number >= blocks, number - blocks, number)
        block = tl.load(order + number)
        entry = bucket - tl.load(offset + number)
        entry = tl.where(entry < 0, entry + dim, entry)  # in the block if less than BLOCK
        row = block // blocks_of_row
        column = (block % blocks_of_row) * BLOCK + entry
        valid = (entry < BLOCK) & (column < width) & (bucket < dim)
        signs = tl.load(words + row.to(tl.int64) * words_of_row + column // 32, mask=valid, other=0)
        sign = 1.0 - 2.0 * ((signs >> (column % 32)) & 1).to(tl.float32)
        at = (row // outputs).to(tl.int64) * stride_tap
        at += (row % outputs).to(tl.int64) * stride_output
        at += column.to(tl.int64) * stride_input
        value = tl.load(base + at, mask=valid & there, other=0.0).to(tl.float32)
        total += sign * value
        if MEASURE:
            measured += value * value
    line = (example * splits + split).to(tl.int64)
    tl.store(partial + line * dim + bucket, total, mask=there & (bucket < dim))
    if MEASURE:
        square = tl.sum(measured, 1, keep_dims=True)
        tl.store(squares + line * tl.num_programs(0) + tile, square, mask=there)


@triton.jit(do_not_specialize=["examples", "dim", "outputs", "layers"])
def fold_rows(
    gradient,  # [examples, outputs, columns], multiplied by the columns' signs
    shift,  # int32 [outputs]: buckets of the outputs
    sign,  # float32 [outputs]
    column_of,  # int32 [layers, dim]: the columns in each bucket, −1 for none
    partial,  # float32 [examples, splits, dim]
    examples,
    dim,
    outputs,
    layers,
    stride_example,
    stride_output,
    EXAMPLES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add the rows of a gradient, each count-sketched and shifted by its output's bucket."""
    # Programs and total as in `fold_blocks`, with splits of the rows. Each bucket gathers its
    # columns, one layer of the table at a time, because scattering would need atomic operations.
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    example = (tl.program_id(2) * EXAMPLES + tl.arange(0, EXAMPLES))[:, None]
    low, high = outputs * split // splits, outputs * (split + 1) // splits
    bucket = (tile * TILE + tl.arange(0, TILE))[None, :]
    there = example < examples
    base = gradient + example.to(tl.int64) * stride_example
    total = tl.zeros([EXAMPLES, TILE], tl.float32)
    for row in range(low, high):
        own = bucket - tl.load(shift + row)
        own = tl.where(own < 0, own + dim, own)
        flip = tl.load(sign + row)
        for layer in range(layers):
            column = tl.load(column_of + layer * dim + own, mask=bucket < dim, other=-1)
            at = tl.cast(row, tl.int64) * stride_output + column
            valid = (column >= 0) & there
            total += flip * tl.load(base + at, mask=valid, other=0.0).to(tl.float32)
    line = (example * splits + split).to(tl.int64)
    tl.store(partial + line * dim + bucket, total, mask=there & (bucket < dim))


@triton.jit(do_not_specialize=["rows", "dim", "layers", "positions"])
def count_sketch(
    x,  # [rows, columns], with the strides below
    column_of,  # int32 [layers, dim]: the columns in each bucket, −1 for none
    sign_of,  # float32 [layers, dim]
    counted,  # float32 [rows, dim]
    rows,
    dim,
    layers,
    positions,
    stride_example,
    stride_position,
    stride_column,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the count sketches of rows: each bucket gets the sum of its signed columns."""
    # Program (ROWS rows, tile of buckets): the map is read once for ROWS rows. The entries of a
    # row are gathered out of order, but are close together and stay in the cache.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    bucket = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :]
    inside = bucket < dim
    base = x + (row // positions).to(tl.int64) * stride_example
    base += (row % positions).to(tl.int64) * stride_position
    total = tl.zeros([ROWS, TILE], tl.float32)
    for layer in range(layers):
        column = tl.load(column_of + layer * dim + bucket, mask=inside, other=-1)
        sign = tl.load(sign_of + layer * dim + bucket, mask=inside, other=0.0)
        valid = (column >= 0) & (row < rows)
        at = column.to(tl.int64) * stride_column
        total += sign * tl.load(base + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(counted + row.to(tl.int64) * dim + bucket, total, mask=inside & (row < rows))


@triton.jit(do_not_specialize=["positions", "frequencies", "stride_spectrum"])
def add_products(
    left,  # complex64 [examples, positions, frequencies], as float32 pairs
    right,  # the same
    spectrum,  # complex64 [examples, frequencies] with the stride below, changed in place
    positions,
    frequencies,
    stride_spectrum,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add ``Σ_p left_p · right_p`` at one tile of frequencies of one example."""
    # Program (tile of frequencies, example), with [STEP, TILE] real and imaginary sums: STEP
    # positions at a time, added up at the end, so that each spectrum is read once and in order.
    example = tl.program_id(1).to(tl.int64)
    frequency = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = frequency < frequencies
    real, imaginary = tl.zeros([STEP, TILE], tl.float32), tl.zeros([STEP, TILE], tl.float32)
    for first in range(0, positions, STEP):
        position = first + tl.arange(0, STEP)[:, None]
        live = (position < positions) & inside[None, :]
        at = 2 * ((example * positions + position) * frequencies + frequency[None, :])
        a = tl.load(left + at, mask=live, other=0.0)
        b = tl.load(left + at + 1, mask=live, other=0.0)
        c = tl.load(right + at, mask=live, other=0.0)
        d = tl.load(right + at + 1, mask=live, other=0.0)
        real += a * c - b * d
        imaginary += a * d + b * c
    out = spectrum + 2 * (example * stride_spectrum + frequency)
    tl.store(out, tl.load(out, mask=inside) + tl.sum(real, 0), mask=inside)
    tl.store(out + 1, tl.load(out + 1, mask=inside) + tl.sum(imaginary, 0), mask=inside)
