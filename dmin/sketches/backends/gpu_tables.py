"""Tables of the entries of each bucket, for the Triton kernels, computed once for a map."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmin.sketches.hashing import hash_words
from dmin.sketches.maps import BlockCyclicMap, TensorSketchMap

TILE = 512  # most buckets of a program


class Blocks(NamedTuple):
    """The blocks of a parameter by ascending offset, and those that overlap each bucket tile."""

    order: Tensor  # int32 [blocks]
    offset: Tensor  # int32 [blocks], ascending
    first: Tensor  # int32 [tiles]: first block of the run
    reaching: Tensor  # int32 [tiles]: blocks in the run


def sorted_blocks(offsets: Tensor, dim: int, block: int) -> Blocks:
    """Sort the blocks of a block-cyclic map; the result takes 8 bytes per block.

    Args:
        offsets: integers ``[blocks]`` in [0, k).
        dim: k.
        block: b.
    """
    offset, order = offsets.sort(stable=True)
    starts = torch.arange(0, dim, tile_of(dim), device=offsets.device)
    if tile_of(dim) + block > dim:
        first, count = torch.zeros_like(starts), torch.full_like(starts, len(offsets))
    else:
        lowest = (starts - block + 1) % dim
        first = torch.searchsorted(offset, lowest)
        count = torch.searchsorted(offset, starts + tile_of(dim)) - first
        count += torch.where(lowest > starts, len(offsets), 0)  # the run wraps around the end
    return Blocks(order.int(), offset.int(), first.int(), count.int())


class Columns(NamedTuple):
    """The entries of a side in each bucket; entries that share a bucket are in different layers."""

    column: Tensor  # int32 [layers, dim], −1 for none
    sign: Tensor  # float32 [layers, dim], 0 for none


class Sides(NamedTuple):
    """The map of a TensorSketch, as the kernels read it."""

    row: Columns
    column: Columns
    row_bucket: Tensor  # int32 [outputs]
    row_sign: Tensor  # float32 [outputs]
    order: Tensor  # int64 [columns]: columns by ascending bucket
    order_sign: Tensor  # float32 [columns]: their signs, in that order
    ordered: Tensor  # int32 [layers, dim]: `column.column` for columns in that order


def blocks_of(map_: BlockCyclicMap, device: torch.device) -> Blocks:
    """Return the sorted blocks of a map, cached because sorting is slow."""
    kept = "blocks", device
    if kept not in map_.kept:
        offsets = hash_words(map_.offset, map_.blocks, device) % map_.dim
        map_.kept[kept] = sorted_blocks(offsets, map_.dim, map_.block)
    return map_.kept[kept]


def sides_of(map_: TensorSketchMap, device: torch.device) -> Sides:
    """Return a TensorSketch for the kernels, computed on the CPU and cached on the device."""
    kept = "sides", device
    if kept not in map_.kept:
        map_.kept[kept] = _sides(map_, device)
    return map_.kept[kept]


def _sides(map_: TensorSketchMap, to: Any) -> Sides:
    (row, column), dim = map_.sides(torch.device("cpu")), map_.dim
    bucket, sign = column
    order = bucket.argsort(stable=True)
    ordered = columns((bucket[order], sign[order]), dim).column
    places = columns(row, dim), columns(column, dim)
    single = row[0].int(), row[1].float(), order, sign[order].float(), ordered
    first, second = (Columns(*(x.to(to) for x in side)) for side in places)
    return Sides(first, second, *(x.to(to) for x in single))


def columns(side: tuple[Tensor, Tensor], dim: int) -> Columns:
    """Return the entries of each bucket, given bucket and sign of each entry; on the CPU."""
    bucket, sign = side
    ascending, order = bucket.sort(stable=True)
    layer = torch.arange(len(bucket)) - torch.searchsorted(ascending, ascending)
    column = torch.full((int(layer.max()) + 1, dim), -1, dtype=torch.int32)
    column[layer, ascending] = order.int()
    return Columns(column, torch.where(column < 0, 0.0, sign.float()[column.long()]))


def tile_of(dim: int) -> int:
    """Return the number of buckets of a program."""
    return min(TILE, 1 << (dim - 1).bit_length())
