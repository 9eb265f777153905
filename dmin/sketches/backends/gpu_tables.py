"""Tables of the entries of each bucket, for the Triton kernels, computed once for a map."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmin.sketches.hashing import hash_words
from dmin.sketches.maps import BlockCyclicMap, TensorSketchMap

TILE = 512  # buckets that a program adds up


class Blocks(NamedTuple):
    """The blocks of a parameter by ascending offset, and those that reach each tile of buckets."""

    order: Tensor  # int32 [blocks]
    offset: Tensor  # int32 [blocks]
    first: Tensor  # int32 [tiles]
    reaching: Tensor  # int32 [tiles]


def sorted_blocks(offsets: Tensor, dim: int, block: int) -> Blocks:
    """Sort the blocks of a block-cyclic map: 8 bytes a block.

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
        count += torch.where(lowest > starts, len(offsets), 0)  # from behind the last bucket, too
    return Blocks(order.int(), offset.int(), first.int(), count.int())


class Columns(NamedTuple):
    """Which entries of a side lie in each bucket; entries of one bucket are in several layers."""

    column: Tensor  # int32 [layers, dim], −1 for none
    sign: Tensor  # float32 [layers, dim], 0 for none


class Sides(NamedTuple):
    """The map of a TensorSketch, as the kernels want it."""

    row: Columns
    column: Columns
    row_bucket: Tensor  # int32 [outputs]
    row_sign: Tensor  # float32 [outputs]
    order: Tensor  # int64 [columns]: by ascending bucket
    order_sign: Tensor  # float32 [columns]: theirs, in that order
    ordered: Tensor  # int32 [layers, dim]: as `column`, of columns in that order


def blocks_of(map_: BlockCyclicMap, device: torch.device) -> Blocks:
    """Return the sorted blocks of a map, which are kept: sorting takes a while."""
    kept = "blocks", device
    if kept not in map_.kept:
        offsets = hash_words(map_.offset, map_.blocks, device) % map_.dim
        map_.kept[kept] = sorted_blocks(offsets, map_.dim, map_.block)
    return map_.kept[kept]


def sides_of(map_: TensorSketchMap, device: torch.device) -> Sides:
    """Return a TensorSketch for the kernels: worked out on the CPU, sent once, kept."""
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
    """Return the entries of each bucket, from the bucket and sign of each entry; on the CPU."""
    bucket, sign = side
    ascending, order = bucket.sort(stable=True)
    layer = torch.arange(len(bucket)) - torch.searchsorted(ascending, ascending)
    column = torch.full((int(layer.max()) + 1, dim), -1, dtype=torch.int32)
    column[layer, ascending] = order.int()
    return Columns(column, torch.where(column < 0, 0.0, sign.float()[column.long()]))


def tile_of(dim: int) -> int:
    """Return how many buckets a program has."""
    return min(TILE, 1 << (dim - 1).bit_length())
