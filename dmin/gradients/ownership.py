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
"""Owners of rows with zero gradient, of rows of several examples, of NaN or infinite rows."""

ATTEMPTS = 50  # more than the nesting depth of modules


class Unsettled(DminError):
    """A pass has to be run again, because something new was found about the owners of its rows.

    :meth:`Ownership.settle` catches it; the message is for passes that run without it.
    """


@dataclass(frozen=True)
class RowOrder:
    """The example that each row of an output's gradient belongs to.

    Attributes:
        axis: axis of the output along which examples follow each other in order, each with the
            same number of entries; None if there is no such axis.
        owners: ``[rows]``, number of the example, or :data:`UNKNOWN`, :data:`SHARED` or
            :data:`BROKEN`. On the CPU.
    """

    axis: int | None
    owners: Tensor

    @property
    def shared(self) -> bool:
        """Whether a row belongs to several examples."""
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
        """Rows of unknown owner, ``[n]``; None if there are none."""
        rows = (self.owners == UNKNOWN).nonzero()[:, 0]
        return rows if len(rows) else None


MAJOR = RowOrder(0, torch.empty(0, dtype=torch.long))
"""Example after example along the first axis, with every owner known."""


@dataclass
class Ownership:
    """What is known about the owners of rows in a network's layers; shared by all its passes.

    Attributes:
        agree: returns whether the flag is True in any of the processes that run a pass together;
            ``bool`` for a single process.
        enclosing: modules whose parameters are differentiated by running the module around them
            again, because they have shared rows or their computation depends on that module.
        by_network: parameters that are differentiated by running the whole network again, one
            example at a time.
        changing: modules that may change their arguments, which are therefore copied.
        unlike: the error of the first module whose output differed when it was run again.
        distinguished: modules whose calls were examined and have rows of single examples,
            whatever their inputs look like.
        complete: examine every pass of a kind with unknown owners, instead of running a pass again
            if rows of unknown owner have gradients.
        latest: kind of the latest pass.
        called: names of the modules that the latest pass called.
        graph_is_lost: whether a forward pass can be differentiated only once.
        probes: projections from the passes of an examination that is not finished.
        watch: whether the next pass examines the network.
        seconds: time spent in passes that only examined the network.
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
        """Run a pass, repeatedly with the same random numbers, until the owners of rows are known.

        Args:
            run: forward and backward in a :class:`~dmin.gradients.capture.Capture` that was
                constructed with this object.
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
        """Have the next pass examined if no pass of these sizes was; this saves a failed attempt.

        A single pair needs no examination, and its result does not depend on earlier passes.
        """
        if pairs == 1:
            self.watch = False
        elif (pairs, *shape) not in self._met:
            self._met.add((pairs, *shape))
            self.watch = True

    @property
    def alone(self) -> bool:
        """Whether this process runs its passes without other processes."""
        return self.agree is bool

    def known(self, kind: Hashable) -> tuple[RowOrder, ...] | None:
        """Return the row orders of a kind of pass; None if it has to be examined."""
        if kind in self._once:
            self.watch = kind not in self._confirmed
            return self._once.pop(kind)
        return self._orders[kind] if kind in self._confirmed else None

    def repeat_otherwise(self, rerun: set[str], alike: set[str], error: DminError) -> bool:
        """Change how modules are run again, after one gave another output.

        First their arguments are copied, since they may change them. Then the module around them
        is run instead, since they may depend on it. Returns whether another way was left.

        Args:
            rerun: the modules that are run again.
            alike: those with the class of the failing module, except the network itself.
            error: its error.
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
        """Whether passes like the latest order rows by data, so that each is examined."""
        return self.called in self._routed

    def route(self) -> None:
        """Examine each pass that calls the same modules as the latest, for each readout."""
        self._routed.add(self.called)

    def learn(self, kind: Hashable, found: Sequence[RowOrder], depends: bool) -> None:
        """Store the row orders of a pass.

        Later passes of the kind use them after two passes gave the same orders, or at once if all
        are example after example; never if the order of rows depends on data.

        Args:
            kind: kind of the pass: batch size, names of calls and shapes.
            found: the row order of each output.
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
        """Examine a kind of pass again, because rows of unknown owner had gradients."""
        self._confirmed.discard(kind)
        self.watch = True


class Trial(Ownership):
    """Assumes example after example everywhere, to measure only time and memory of a pass."""

    def expect(self, pairs: int, shape: Sequence[int]) -> None:
        """Examine nothing."""

    def known(self, kind: Hashable) -> tuple[RowOrder, ...]:
        """Return no order: all outputs have example after example."""
        return ()


def _merged(before: RowOrder, found: RowOrder) -> RowOrder | None:
    """Return the combined order of two passes; None if they contradict each other."""
    if before is MAJOR or found is MAJOR:
        other = found if before is MAJOR else before
        return MAJOR if other.axis == 0 else None
    owners = torch.where(before.owners == UNKNOWN, found.owners, before.owners)
    if not bool(((found.owners == UNKNOWN) | (found.owners == owners)).all()):
        return None
    axis = before.axis if before.axis == found.axis else None
    complete = axis == 0 and not bool((owners == UNKNOWN).any())
    return MAJOR if complete else RowOrder(axis, owners)
