"""Maps that give each scalar of a parameter one bucket and one sign: the input of a backend."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dmin.sketches.hashing import hash_words, signs, spread_words

CountSketch = tuple[Tensor, Tensor]  # bucket in [0, k) and sign of each row or column


def as_matrices(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (taps, out, in): the shape of a parameter as one matrix per tap of its kernel.

    A vector is a single row. Entries are numbered in the order (tap, out, in).
    """
    if len(shape) < 2:
        return 1, 1, prod(shape)
    return prod(shape[2:]), shape[0], shape[1]


class Map(ABC):
    """The map of one parameter's gradients to k dimensions.

    Args:
        shape: shape of the parameter.
        dim: k.

    Attributes:
        kept: cache of tables computed from the map, by device and backend.
    """

    def __init__(self, shape: tuple[int, ...], dim: int) -> None:
        self.shape = shape
        self.dim = dim
        self.kept: dict[Any, Any] = {}

    @abstractmethod
    def buckets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the map as one bucket and one sign per scalar.

        Returns:
            bucket: integers ``[P]``, in [0, k), for each scalar of the flattened parameter.
            sign: float32 ``[P]``, ±1.
        """


class BlockCyclicMap(Map):
    """One hashed sign per entry, and one hashed offset per block of a row.

    Args:
        shape: shape of the parameter.
        dim: k.
        block: b, the length of a block.
        sign: key of the signs.
        offset: key of the offsets.
    """

    def __init__(
        self, shape: tuple[int, ...], dim: int, block: int, sign: int, offset: int
    ) -> None:
        super().__init__(shape, dim)
        self.block = block
        self.sign = sign
        self.offset = offset
        taps, out, width = as_matrices(shape)
        self.width: int = width
        self.rows: int = taps * out
        self.blocks: int = self.rows * -(-self.width // block)
        self.words: int = self.rows * -(-self.width // 32)  # of 32 signs

    def buckets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return buckets and signs, hashed anew at each call."""
        offsets = hash_words(self.offset, self.blocks, device)
        bucket = offsets[:, None] % self.dim + torch.arange(self.block, device=device)
        bucket = bucket.view(self.rows, -1)[:, : self.width] % self.dim
        sign = signs(self.sign, self.words * 32, device).view(self.rows, -1)[:, : self.width]
        return self._taps_last(bucket), self._taps_last(sign)

    def _taps_last(self, entries: Tensor) -> Tensor:
        """Reorder entries from (tap, out, in) to the order of the flattened parameter."""
        taps, out, width = as_matrices(self.shape)
        return entries.reshape(taps, out * width).T.reshape(-1)


class TensorSketchMap(Map):
    """The bucket is the sum of a row's and a column's bucket, the sign the product of their signs.

    Args:
        shape: shape of the parameter.
        dim: k.
        row: keys of the buckets and the signs of outputs.
        column: the same for the inputs of all taps.
    """

    def __init__(
        self, shape: tuple[int, ...], dim: int, row: tuple[int, int], column: tuple[int, int]
    ) -> None:
        super().__init__(shape, dim)
        self.row = row
        self.column = column

    def sides(self, device: torch.device) -> tuple[CountSketch, CountSketch]:
        """Return bucket and sign of each output, and of each input for each tap.

        They are cached, since computing them sorts: 12 bytes each, a thousandth of the matrix.
        """
        if device not in self.kept:
            taps, out, width = as_matrices(self.shape)
            self.kept[device] = tuple(
                (spread_words(bucket, size, device) % self.dim, signs(sign, size, device))
                for (bucket, sign), size in ((self.row, out), (self.column, taps * width))
            )
        return self.kept[device]

    def buckets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return buckets and signs of all entries."""
        (row, row_sign), (column, column_sign) = self.sides(device)
        taps, out, width = as_matrices(self.shape)
        bucket, sign = (row[:, None] + column) % self.dim, row_sign[:, None] * column_sign
        natural = (x.view(out, taps, width).transpose(1, 2).reshape(-1) for x in (bucket, sign))
        return next(natural), next(natural)
