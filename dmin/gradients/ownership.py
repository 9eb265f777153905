"""Which example each row of a layer's output gradient belongs to, found in the backward pass.

The gradient of a layer's weight is Σ_r d_r ⊗ a_r over rows r (tokens, images). Which of them belong
to example b no shape can tell: B rows may be B examples, or one table that all of them share. The
output gradients d tell. With the loss of example b scaled by 2^e(b), a row that is b's own scales
by exactly that, at no rounding; one that several examples have a part in, by no such factor. A few
passes with e the digits of b's number name the owner of every row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from dmin.runtime.errors import DminError

Result = TypeVar("Result")

UNKNOWN, SHARED, BROKEN = -1, -2, -3
"""Owners of rows whose gradient is zero, that are no one example's, that are NaN or infinite."""

# More than modules stand in each other.
ATTEMPTS = 50
# Numbers kept of each row: a row that is shared scales by one factor in all of them by no chance.
PROJECTIONS = 2


class Unsettled(DminError):
    """Something was found out about the rows of a pass, which has to be run again.

    Only :meth:`Ownership.settle` should see it; its message is for passes that are not run so.
    """


@dataclass(frozen=True)
class RowOrder:
    """Which rows of one call's output gradient are which example's.

    Attributes:
        axis: axis of the output along which examples follow each other in order, as many entries
            each; None if no axis does.
        owners: ``[rows]``, number of the example; :data:`UNKNOWN` or :data:`SHARED`. On the CPU.
    """

    axis: int | None
    owners: Tensor

    @property
    def shared(self) -> bool:
        """Whether a row is no one example's."""
        return bool((self.owners == SHARED).any())

    @property
    def broken(self) -> bool:
        """Whether a row is NaN or infinite."""
        return bool((self.owners == BROKEN).any())

    @property
    def reached(self) -> bool:
        """Whether any row has a gradient."""
        return self is MAJOR or bool((self.owners != UNKNOWN).any())

    @cached_property
    def unknown(self) -> Tensor | None:
        """Rows whose owner is not known, ``[n]``; None if there are none."""
        rows = (self.owners == UNKNOWN).nonzero()[:, 0]
        return rows if len(rows) else None


MAJOR = RowOrder(0, torch.empty(0, dtype=torch.long))
"""Example after example along the first axis, every owner known."""


@dataclass
class Ownership:
    """What has been found out about the rows of a network's layers; shared by all its passes.

    Attributes:
        agree: says whether any process wants what this one does or does not, where several run a
            pass together.
        enclosing: modules whose parameters are differentiated by running the module around them
            again, because rows of theirs are no one example's.
        by_network: parameters that are differentiated by running the whole network again, an
            example at a time.
        changing: modules that may change their arguments, which are copied before.
        having: modules whose calls were examined and have rows of examples, whatever their inputs
            look like.
        complete: examine each pass of a kind in which not every owner is known, rather than run one
            again if that turns out to matter.
        latest: kind of the latest pass.
        called: the modules that it called, by name.
        graph_is_lost: whether a pass can be differentiated only once.
        probes: what passes so far kept of the rows of calls, while they are being examined.
        watch: whether the next pass is there to examine the network.
        seconds: that went into passes which were there for that alone.
    """

    agree: Callable[[bool], bool] = bool
    enclosing: set[str] = field(default_factory=set)
    by_network: set[str] = field(default_factory=set)
    changing: set[str] = field(default_factory=set)
    having: set[str] = field(default_factory=set)
    complete: bool = False
    graph_is_lost: bool = False
    probes: list = field(default_factory=list)
    latest: Hashable = None
    called: tuple[str, ...] = ()
    watch: bool = False
    seconds: float = 0.0
    _orders: dict[Hashable, tuple[RowOrder, ...]] = field(default_factory=dict)
    _confirmed: set[Hashable] = field(default_factory=set)
    _once: dict[Hashable, tuple[RowOrder, ...]] = field(default_factory=dict)
    _routed: set[Hashable] = field(default_factory=set)
    _met: set[Hashable] = field(default_factory=set)

    def settle(self, run: Callable[[], Result]) -> Result:
        """Run a pass, again from the same random numbers until it is known whose rows are whose.

        Args:
            run: the pass: forward and backward in a :class:`~dmin.gradients.capture.Capture` that
                was given this object.
        """
        state = torch.get_rng_state()
        self.probes.clear()
        for _ in range(ATTEMPTS):
            start = time.perf_counter()
            try:
                return run()
            except Unsettled:
                self.seconds += time.perf_counter() - start
                torch.set_rng_state(state)
        raise DminError(
            "it cannot be settled which rows of this network's layers are which example's: they "
            "are others each time it is run. Set collect.microbatch=1, which computes every pair "
            "alone."
        )

    def expect(self, pairs: int, shape: Sequence[int]) -> None:
        """Examine the next pass if none like it was: saves the attempt that would find that out."""
        if pairs > 1 and (pairs, *shape) not in self._met:
            self._met.add((pairs, *shape))
            self.watch = True

    def known(self, kind: Hashable) -> tuple[RowOrder, ...] | None:
        """Return the orders of the calls of such a pass; None if they have to be found."""
        if kind in self._once:
            self.watch = kind not in self._confirmed
            return self._once.pop(kind)
        return self._orders[kind] if kind in self._confirmed else None

    def routed(self, kind: Hashable) -> bool:
        """Return whether the orders of such a pass come from data, so that each is examined."""
        return kind in self._routed

    def learn(self, kind: Hashable, found: Sequence[RowOrder], depends: bool) -> None:
        """Take the orders of the calls of a pass.

        They are believed of later passes of the kind once two passes gave the same, or at once
        where all is example after example; never where the order of rows comes from data.

        Args:
            kind: of pass: names of calls and shapes.
            found: of each call.
            depends: whether the network took an index or a decision from data.
        """
        before, orders = self._orders.get(kind), tuple(found)
        if before is not None and not depends:
            merged = [_merged(*pair) for pair in zip(before, found, strict=True)]
            depends = any(order is None for order in merged)
            orders = tuple(order for order in merged if order is not None)
        if depends or (self.complete and any(order.unknown is not None for order in orders)):
            self._routed.add(kind)
            return
        self._orders[kind] = self._once[kind] = orders
        if before is not None or all(order.axis == 0 for order in orders):
            self._confirmed.add(kind)

    def doubt(self, kind: Hashable) -> None:
        """Have a kind of pass be examined again: rows of unknown owner have gradients."""
        self._confirmed.discard(kind)
        self.watch = True


class Trial(Ownership):
    """Takes all rows for example after example, where only time and memory of a pass matter."""

    def expect(self, pairs: int, shape: Sequence[int]) -> None:
        """Examine nothing."""

    def known(self, kind: Hashable) -> tuple[RowOrder, ...]:
        """Return no other order."""
        return ()


def _merged(before: RowOrder, found: RowOrder) -> RowOrder | None:
    """Return what two passes say together; None if they contradict each other."""
    if before is MAJOR or found is MAJOR:
        other = found if before is MAJOR else before
        return MAJOR if other.axis == 0 else None
    owners = torch.where(before.owners == UNKNOWN, found.owners, before.owners)
    if not bool(((found.owners == UNKNOWN) | (found.owners == owners)).all()):
        return None
    axis = before.axis if before.axis == found.axis else None
    complete = axis == 0 and not bool((owners == UNKNOWN).any())
    return MAJOR if complete else RowOrder(axis, owners)


def digits(batch: int, base: int) -> list[Tensor]:
    """Return the exponents of the passes that spell each example's number, ``[batch]`` each.

    Args:
        batch: number of examples.
        base: 8 takes one pass up to 8 examples, two up to 64.
    """
    number = torch.arange(batch)
    spelled: list[Tensor] = []
    while not spelled or bool(number.any()):
        spelled.append(number % base)
        number = number // base
    return spelled


class Projector:
    """Keeps a few numbers of each row of output gradients: random projections, the same each time.

    Args:
        device: of the gradients.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(0)
        self._maps: dict[int, Tensor] = {}

    def __call__(self, gradient: Tensor, features: int) -> Tensor:
        """Return ``[rows, PROJECTIONS]`` of a gradient whose last so many axes are a row."""
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
        plain: ``[rows, PROJECTIONS]`` of the gradient.
        scaled: the same of each pass with scaled losses.
        batch: number of examples.
        base: of the digits that the passes spell.
        tolerance: of the ratio of two gradients. They scale without rounding; two runs of a GPU's
            kernels differ, and half precision has no small numbers.
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
    """Return the order of rows, and the axis it goes along if it does.

    Args:
        owners: ``[prod(shape)]``.
        shape: of the rows: the output's leading axes.
        batch: number of examples.
    """
    known = owners != UNKNOWN
    if not bool(known.any()):  # takes no memory
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
