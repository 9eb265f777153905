"""Which example each row of a layer's output gradient belongs to, found in the backward pass.

The gradient of a layer's weight is Σ_r d_r ⊗ a_r over rows r (tokens, images). Shapes do not
determine which of them belong to example b: B rows may be B examples, or one table that all of them
share. The output gradients d do. If the loss of example b is scaled by 2^e(b), a row of example b
scales by exactly this factor, without rounding; a row that several examples contribute to scales by
no such factor. A few passes with e the digits of b identify the owner of every row.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from dmin.runtime.errors import DminError

Result = TypeVar("Result")

UNKNOWN, SHARED, BROKEN = -1, -2, -3
"""Owners of rows whose gradient is zero, that are no one example's, that are NaN or infinite."""

# More than modules stand in each other.
ATTEMPTS = 50


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
            again, because rows of theirs are no one example's, or what they compute depends on it.
        by_network: parameters that are differentiated by running the whole network again, an
            example at a time.
        changing: modules that may change their arguments, which are copied before.
        unlike: what the first module said that gave another output when it was run again.
        distinguished: modules whose calls were examined and have rows of examples, whatever their
            inputs look like.
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
    unlike: DminError | None = None
    distinguished: set[str] = field(default_factory=set)
    complete: bool = False
    graph_is_lost: bool = False
    probes: list[Any] = field(default_factory=list)
    latest: Hashable = None
    called: tuple[str, ...] = ()
    watch: bool = False
    seconds: float = 0.0
    _orders: dict[Hashable, tuple[RowOrder, ...]] = field(default_factory=dict)
    _confirmed: set[Hashable] = field(default_factory=set)
    _once: dict[Hashable, tuple[RowOrder, ...]] = field(default_factory=dict)
    _routed: set[tuple[str, ...]] = field(default_factory=set)
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
            "it cannot be determined which rows of this network's layers belong to which example: "
            "the order differs each time it runs. Set collect.microbatch=1, which computes every "
            "pair alone."
        )

    def expect(self, pairs: int, shape: Sequence[int]) -> None:
        """Examine the next pass if none like it was: saves the attempt that would find that out.

        One pair alone needs none, and has the same bits whatever was run before.
        """
        if pairs == 1:
            self.watch = False
        elif (pairs, *shape) not in self._met:
            self._met.add((pairs, *shape))
            self.watch = True

    @property
    def alone(self) -> bool:
        """Whether this process runs its passes by itself."""
        return self.agree is bool

    def known(self, kind: Hashable) -> tuple[RowOrder, ...] | None:
        """Return the orders of the calls of such a pass; None if they have to be found."""
        if kind in self._once:
            self.watch = kind not in self._confirmed
            return self._once.pop(kind)
        return self._orders[kind] if kind in self._confirmed else None

    def repeat_otherwise(self, rerun: set[str], alike: set[str], error: DminError) -> bool:
        """Have modules that give another output when they are run again be run otherwise.

        First from copies of their arguments, which they may change; then with what is around them,
        which they may depend on.

        Args:
            rerun: the modules that are run again.
            alike: those of them of the class that gave another output, but for the network.
            error: what it said.

        Returns:
            Whether anything is left to try.
        """
        left = not rerun <= self.changing or not alike <= self.enclosing
        if not self.alone or not left:
            return False
        if rerun <= self.changing:
            self.enclosing |= alike
        self.changing |= rerun
        self.unlike = self.unlike or error
        return True

    @property
    def routed(self) -> bool:
        """Whether the orders of passes like the latest come from data, so that each is examined."""
        return self.called in self._routed

    def route(self) -> None:
        """Have each pass that calls what the latest called be examined, for each readout."""
        self._routed.add(self.called)

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
            self.route()
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
