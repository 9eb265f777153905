"""The examination of a network: a few backward passes show which example each row belongs to."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dmin.gradients.calls import Call, Probe, Tap
from dmin.gradients.data_dependence import DataDependence
from dmin.gradients.ownership import Ownership, RowOrder, Unsettled
from dmin.gradients.parameters import some_of
from dmin.gradients.projections import Projector, digits
from dmin.runtime.errors import DminError


class Coupled(DminError):
    """The loss of an example depends on other examples of the pass."""


class Examination:
    """Context that records how a network uses its inputs.

    Attributes:
        inputs: one call for each floating-point input of the network.

    Args:
        capture: receives the gradients of the inputs.
        network: the network to examine.
        anchor: a tensor that requires gradients, which makes the inputs part of a graph.
        data: tensors other than the network's inputs that rows may be ordered by.
    """

    def __init__(
        self, capture: Any, network: nn.Module, anchor: Tensor, data: Iterable[Tensor] = ()
    ) -> None:
        self._capture, self._network, self._anchor = capture, network, anchor
        self._noted = DataDependence()
        self._noted.begins(data)
        self.inputs: list[Call] = []
        self._inside = 0

    def __enter__(self) -> Self:
        """Hook the begin and end of the network's forward."""
        with ExitStack() as undo:
            begins = self._network.register_forward_pre_hook(self._begin, with_kwargs=True)
            undo.callback(begins.remove)
            undo.callback(self._network.register_forward_hook(self._end, always_call=True).remove)
            self._undo = undo.pop_all()
        self._noted.__enter__()
        self._noting = True
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the hooks."""
        self.forward_done()
        self._undo.close()

    def forward_done(self) -> None:
        """Stop recording: later operations are not the model's."""
        if self._noting:
            self._noted.__exit__(None, None, None)
            self._noting = False

    @property
    def depends(self) -> bool:
        """Whether the network took an index or a decision from data."""
        return self._noted.found

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._inside or not torch.is_grad_enabled():
            return None
        args, kwargs = pytree.tree_map(self._tapped, (args, kwargs))
        self._noted.begins(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        self._inside = 1
        return args, kwargs

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._inside = 0

    def _tapped(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, nn.Parameter):
            return x
        if not x.is_floating_point() or x.ndim == 0:
            return x
        name = f"input {len(self.inputs)} of the network"
        call = Call(-1, name, self._network, set(), {}, None, (x.shape,), x.dtype)
        self.inputs.append(call)
        return Tap.apply(self._capture, call, self._anchor, 1, x)[0]

    def require_apart(
        self, inputs: Sequence[RowOrder], calls: Sequence[Call], orders: Sequence[RowOrder]
    ) -> None:
        """Refuse a network in which an example's loss depends on the inputs of other examples.

        Args:
            inputs: row orders of the network's inputs.
            calls: calls of the forward pass.
            orders: row orders of their outputs.

        Raises:
            Coupled: the loss does; the message names the layer behind which it happens.
        """
        reached = [order for order in inputs if order.reached]
        if not reached or not all(order.shared for order in reached):
            return
        mixed = [
            c.name for c in calls if any(orders[c.number + i].shared for i in range(len(c.shapes)))
        ]
        statistics = [
            name
            for name, module in self._network.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and (module.training or module.running_mean is None)
        ]
        where = (
            f"{some_of(statistics)} take(s) statistics of the batch"
            if statistics
            else (
                f"it happens behind {mixed[-1]}" if mixed else "it happens before the first layer"
            )
        )
        raise Coupled(
            f"this network mixes the examples of a pass: {where}. Set collect.microbatch=1, which "
            "computes every pair alone."
        )


def kind_of(batch: int, told: Sequence[int | str], calls: Sequence[Call]) -> Hashable:
    """Return a key of a pass; passes with another key may have another order of rows."""
    return batch, tuple(told), *(call.kind for call in calls)


class Prober:
    """Finds the owner of each row by backward passes with scaled losses.

    Args:
        ownership: what is known about owners; findings are added.
        network: the network whose calls are examined.
        backpropagate: a function of the values, and whether to keep the graph.

    Attributes:
        projector: projects the output gradients of calls during an examining pass; else None.
    """

    def __init__(
        self,
        ownership: Ownership,
        network: nn.Module,
        backpropagate: Callable[[Tensor, bool], None],
    ) -> None:
        self.ownership = ownership
        self.network = network
        self._backpropagate = backpropagate
        self.projector: Projector | None = None

    def orders(
        self, values: Tensor, calls: Sequence[Call], examination: Examination | None
    ) -> dict[int, RowOrder]:
        """Return the row order of each output; examine the pass if it is not known.

        Args:
            values: the examples' values, ``[batch]``.
            calls: calls of the forward pass.
            examination: the examination in which the forward pass ran, or None.

        Returns:
            Row orders by number of the output; missing outputs have example after example.

        Raises:
            Unsettled: this pass only examined the network, or such a pass is needed first.
        """
        ownership, kind = self.ownership, self.ownership.latest
        routed = examination is None and ownership.routed
        known = ownership.known(kind) if examination is None and not routed else None
        if not ownership.agree(known is None):
            return dict(enumerate(known or ()))
        if ownership.agree(examination is None and not routed):
            ownership.watch = True
            raise Unsettled(
                "the rows of this network's layers have not been examined yet. Run the pass in "
                "Ownership.settle, which runs it again."
            )
        inputs = [] if examination is None else examination.inputs
        orders = self._probe(values, [*inputs, *calls])
        if ownership.agree(any(order.broken for order in orders)):
            return {}  # rows are NaN or infinite, and will be refused later
        found = orders[len(inputs) :]
        if examination is not None:
            examination.require_apart(orders[: len(inputs)], calls, found)
        unsettled = self._escalate(calls, found)
        if examination is not None and not unsettled:
            ownership.learn(kind, found, examination.depends)
            ownership.distinguished.update(call.name for call in calls)
            ownership.watch = False
        if unsettled or examination is not None:
            raise Unsettled("the rows of this network's layers were examined. Run the pass again.")
        return dict(enumerate(found))

    def _probe(self, values: Tensor, calls: Sequence[Call]) -> list[RowOrder]:
        """Return the row order of each output of some calls."""
        half = any(call.dtype == torch.float16 for call in calls)
        base = 4 if half else 8  # the range of half precision is too small for 8
        tolerance = 1e-4 if values.device.type == "cpu" and not half else 0.2
        exponents = digits(len(values), base)
        exponents.insert(0, torch.zeros_like(exponents[0]))
        kept = self.ownership.probes
        while len(kept) < len(exponents):
            scaled = values * (2.0 ** exponents[len(kept)]).to(values)
            kept.append(self._passed(scaled, calls))
            if self.ownership.graph_is_lost and len(kept) < len(exponents):
                raise Unsettled("a pass can be differentiated once. Run the pass again.")
        by_call = list(zip(*kept, strict=True))
        kept.clear()
        return [
            order
            for call, probes in zip(calls, by_call, strict=True)
            for order in call.orders(probes, len(values), base, tolerance)
        ]

    def _passed(self, values: Tensor, calls: Sequence[Call]) -> list[Probe]:
        """Run one backward pass and return projections of the calls' output gradients."""
        for call in calls:
            call.probe = None
        self.projector = Projector(values.device)
        try:
            self._backpropagate(values, not self.ownership.graph_is_lost)
        except RuntimeError:
            if not self.ownership.probes or self.ownership.graph_is_lost:
                raise
            # Some operation frees its buffers: each backward pass needs a new forward pass.
            self.ownership.graph_is_lost = True
            raise Unsettled("a pass can be differentiated once. Run the pass again.") from None
        finally:
            self.projector = None
        return [call.probe for call in calls]

    def _escalate(self, calls: Sequence[Call], found: Sequence[RowOrder]) -> bool:
        """Have the modules around calls with shared rows run again; return whether there are any.

        Raises:
            DminError: there is no module around, or several processes run the pass together.
        """
        shared = [
            call
            for call in calls
            if any(found[call.number + i].shared for i in range(len(call.shapes)))
        ]
        alone, top = self.ownership.alone, self.network
        lost = {n for call in shared for n in call.parameters if not alone or call.module is top}
        if lost:
            raise DminError(
                f"the gradients of {len(lost)} parameter(s) cannot be separated by example: "
                f"{some_of(lost)}. Compute every pair alone with collect.microbatch=1."
            )
        self.ownership.enclosing.update(call.name for call in shared)
        return bool(shared)
