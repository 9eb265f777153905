"""One backward pass: gradients of calls arrive, in factors, and are handed to a sink.

A parameter's gradients are handed on as soon as those of its last call have arrived, so that no
more of them are in memory than one layer's.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Generic

import torch
from torch import Tensor

from dmin.gradients.calls import Call
from dmin.gradients.factors import GradientFactors, Sum
from dmin.gradients.ownership import MAJOR, RowOrder
from dmin.gradients.rerun import PerExampleRerun
from dmin.gradients.rows import Arrived, Ordered, factors_of
from dmin.gradients.sink import Rows, Sink, State
from dmin.gradients.usage import ParameterUsage

CLOSED_FORM, RERUN, UNUSED = "closed form", "per-example rerun", "unused"


class BackwardPass(Generic[State, Rows]):
    """State of the backward pass that is running.

    Args:
        sink: receives the factors.
        usage: watches the parameters.
        uses: number of calls of each parameter in the forward passes.
        orders: of the rows of each output, by its number.
        like: a scalar of the dtype and device of the gradients.
        batch: number of examples.
        budget: most bytes of per-example gradients in memory at once.
        paths: how each parameter's gradient was computed; added to.

    Attributes:
        state: of the sink.
        arrived: gradients of parameters of which more calls are to come.
        doubt: whether a row of unknown owner has a gradient.
    """

    def __init__(
        self,
        sink: Sink[State, Rows],
        usage: ParameterUsage[Call],
        uses: Counter[str],
        orders: Mapping[int, RowOrder],
        like: Tensor,
        batch: int,
        budget: int,
        paths: defaultdict[str, set[str]],
    ) -> None:
        self.state: State = sink.begin(batch, like, budget)
        self.arrived: dict[str, list[GradientFactors | Arrived]] = {}
        self.doubt: Tensor | None = None
        self._sink, self._usage, self._uses, self._orders = sink, usage, uses, orders
        self._batch, self._budget, self._paths = batch, budget, paths
        self._empty: Counter[str] = Counter()  # calls per parameter without gradient

    def arrive(self, call: Call, inputs: Sequence[Tensor], gradients: Sequence[Any]) -> None:
        """Receive the gradients of a call's outputs; flush parameters whose last call this was."""
        if not any(g is not None and g.numel() for g in gradients):  # no rows: as if not called
            self._empty.update(call.parameters)
            for name in call.parameters:
                self._flush_complete(name, {})
            return
        orders = [self._orders.get(call.number + i, MAJOR) for i in range(len(call.shapes))]
        for doubt in call.doubts(orders, gradients):
            self.doubt = doubt if self.doubt is None else self.doubt | doubt
        path, arrived = self._formed(call, inputs, gradients, orders)
        ordered: Ordered = {}
        for name in sorted(call.parameters):
            self._paths[name].add(path)
            self.arrived.setdefault(name, []).append(arrived[name])
            self._flush_complete(name, ordered)

    def flush_incomplete(self) -> None:
        """Flush the parameters of which some calls did not affect the values."""
        with self._usage.off():  # modules may be run again
            for name in list(self.arrived):
                self._flush(name, {})

    def _formed(
        self,
        call: Call,
        inputs: Sequence[Tensor],
        gradients: Sequence[Any],
        orders: Sequence[RowOrder],
    ) -> tuple[str, Mapping[str, GradientFactors | Arrived]]:
        """Return how the gradients of a call's parameters are computed, and these by name."""
        batch, order = self._batch, orders[0]
        if isinstance(call.how, PerExampleRerun):
            parameters = self._usage.now(call.parameters)
            with self._usage.off():
                found = call.how.factors(inputs, gradients, parameters, orders, batch, self._budget)
            return f"{RERUN} ({call.how.name})", found
        if order.axis == 0 and len(gradients[0]) % batch == 0:
            parts = call.how(call.module, inputs[0], gradients[0], batch)
            own = call.own.items()
            return CLOSED_FORM, {n: parts[local] for local, n in own if n in call.parameters}
        owners = order.owners
        if order is MAJOR:  # only assumed, in a Trial, which measures time and memory
            owners = torch.arange(call.rows(0).numel()) % batch
        waits = Arrived(call, inputs[0], gradients[0], owners)
        return CLOSED_FORM, dict.fromkeys(call.parameters, waits)

    def _flush_complete(self, name: str, ordered: Ordered) -> None:
        """Hand a parameter's gradients to the sink if its last call has arrived."""
        parts = self.arrived.get(name)
        if parts and len(parts) + self._empty[name] == self._uses[name]:
            with self._usage.off():  # modules may be run again
                self._flush(name, ordered)

    def _flush(self, name: str, ordered: Ordered) -> None:
        """Hand one parameter's gradients to the sink and forget them.

        Args:
            name: name of the parameter.
            ordered: factors already sorted by example for other parameters of the same layer.
        """
        parts = factors_of(name, self.arrived.pop(name), self._batch, ordered)
        self._sink.add(self.state, name, parts[0] if len(parts) == 1 else Sum(parts))
