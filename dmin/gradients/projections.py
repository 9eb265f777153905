"""Random projections of each row of output gradients, and the owners derived from them."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dmin.gradients.ownership import BROKEN, MAJOR, SHARED, UNKNOWN, RowOrder

# Projections per row. A shared row practically never scales by one factor in all of them.
PROJECTIONS = 2


def digits(batch: int, base: int) -> list[Tensor]:
    """Return the digits of the examples' numbers, ``[batch]`` for each pass, lowest first.

    Args:
        batch: number of examples.
        base: base of the digits; 8 takes one pass up to 8 examples, two up to 64.
    """
    number = torch.arange(batch)
    spelled: list[Tensor] = []
    while not spelled or bool(number.any()):
        spelled.append(number % base)
        number = number // base
    return spelled


class Projector:
    """Random projections of the rows of output gradients, the same for every projector.

    Args:
        device: device of the gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(0)
        self._maps: dict[int, Tensor] = {}

    def __call__(self, gradient: Tensor, features: int) -> Tensor:
        """Return projections ``[rows, PROJECTIONS]``; the last ``features`` axes form a row."""
        axes = gradient.ndim - features
        count, width = prod(gradient.shape[:axes]), prod(gradient.shape[axes:])
        rows = gradient.detach().reshape(count, width)
        if rows.is_complex():
            rows, width = torch.view_as_real(rows).flatten(1), 2 * width
        if width not in self._maps:
            drawn = torch.randn(width, PROJECTIONS, generator=self._generator)
            self._maps[width] = drawn.to(self.device)
        dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
        return rows.to(dtype) @ self._maps[width].to(dtype)


def owners_of(
    plain: Tensor, scaled: Sequence[Tensor], batch: int, base: int, tolerance: float
) -> Tensor:
    """Return the owner of each row, ``[rows]``, on the CPU.

    Args:
        plain: projections of the gradient, ``[rows, PROJECTIONS]``.
        scaled: the same for each pass with scaled losses.
        batch: number of examples.
        base: base of the digits.
        tolerance: relative tolerance for the ratio of two gradients. Scaling is exact, but two
            runs of a GPU's kernels differ, and half precision underflows.
    """
    owner = torch.zeros(len(plain), dtype=torch.long, device=plain.device)
    own = torch.ones(len(plain), dtype=torch.bool, device=plain.device)
    zero = (plain == 0).all(1)
    place = 1
    for numbers in scaled:
        largest = plain.abs().argmax(1, keepdim=True)
        ratio = (numbers / plain).gather(1, largest)[:, 0]
        digit = ratio.clamp(min=0.5, max=2.0**base).nan_to_num(1.0).log2().round().long()
        digit = digit.clamp(0, base - 1)
        expected = plain * (2.0**digit)[:, None]
        own &= ((numbers - expected).abs() <= tolerance * expected.abs()).all(1)
        zero &= (numbers == 0).all(1)
        owner += place * digit
        place *= base
    owner = torch.where(own & (owner < batch), owner, SHARED)
    owner = torch.where(zero, UNKNOWN, owner)
    return torch.where(plain.isfinite().all(1), owner, BROKEN).to(torch.int32).cpu()


def order_of(owners: Tensor, shape: Sequence[int], batch: int) -> RowOrder:
    """Return the order of rows, with the axis along which examples follow each other, if any.

    Args:
        owners: owner of each row, ``[prod(shape)]``.
        shape: sizes of the output's leading axes, along which rows are numbered.
        batch: number of examples.
    """
    known = owners != UNKNOWN
    if not bool(known.any()):  # an expanded tensor takes no memory
        return RowOrder(0, owners[:1].expand(len(owners)))
    for axis, size in enumerate(shape):
        if size % batch:
            continue
        line = torch.arange(size).div(size // batch, rounding_mode="floor")
        expected = line.view(-1, *[1] * (len(shape) - axis - 1)).expand(*shape).reshape(-1)
        if bool((owners == expected)[known].all()):
            whole = axis == 0 and bool(known.all())
            return MAJOR if whole else RowOrder(axis, owners)
    return RowOrder(None, owners)
