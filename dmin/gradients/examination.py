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
    """The loss of an example depends on the others of its pass."""


class Examination:
    """Context in which a network is examined: what it does with its inputs.

    Attributes:
        inputs: tensors that the network was given.

    Args:
        capture: that the inputs' gradients are shown to.
        network: to examine.
        anchor: what makes tensors part of a graph.
        data: what examples are made of, beside the network's inputs.
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
        """Hear when the network's forward begins and ends."""
        with ExitStack() as undo:
            begins = self._network.register_forward_pre_hook(self._begin, with_kwargs=True)
            undo.callback(begins.remove)
            undo.callback(self._network.register_forward_hook(self._end, always_call=True).remove)
            self._undo = undo.pop_all()
        self._noted.__enter__()
        self._noting = True
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the network as it was."""
        self.forward_done()
        self._undo.close()

    def forward_done(self) -> None:
        """Note no more: what follows is not the model's doing."""
        if self._noting:
            self._noted.__exit__(None, None, None)
            self._noting = False

    @property
    def depends(self) -> bool:
        """Whether the network took an index or a decision from its inputs."""
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
        """Refuse a network in which the loss of an example depends on the others' inputs.

        Args:
            inputs: the order of the rows of the network's inputs.
            calls: of the forward pass.
            orders: of their outputs' rows.

        Raises:
            Coupled: it does, and behind which layer.
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
            f"the examples of a pass see each other in this network: {where}. Set "
            f"collect.microbatch=1, which computes every pair alone."
        )


def kind_of(batch: int, told: Sequence[int | str], calls: Sequence[Call]) -> Hashable:
    """Return what tells a pass from others whose rows may be ordered otherwise."""
    return batch, tuple(told), *(call.kind for call in calls)


class Prober:
    """Finds out whose rows are whose, by backward passes with scaled losses.

    Args:
        ownership: what is known; what is found out is added.
        network: whose calls are examined.
        backpropagate: values, and whether to keep the graph.

    Attributes:
        projector: takes the output gradients of calls, while a probe is under way.
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
        """Return the order of the rows of each output; find it out if it is not known.

        Args:
            values: of the examples, ``[batch]``.
            calls: of the forward pass.
            examination: that it was, or None.

        Returns:
            Of the outputs of the calls, by number; those that lack are example after example.

        Raises:
            Unsettled: it was found out by a pass that was for that alone, or needs such a pass.
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
            return {}  # whoever takes the rows refuses them: they are NaN or infinite
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
        """Return the order of the rows of each output of some calls."""
        half = any(call.dtype == torch.float16 for call in calls)
        base = 4 if half else 8  # half precision has not the range
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
        """Return a few numbers of each row of the output gradients of calls, by one pass."""
        for call in calls:
            call.probe = None
        self.projector = Projector(values.device)
        try:
            self._backpropagate(values, not self.ownership.graph_is_lost)
        except RuntimeError:
            if not self.ownership.probes or self.ownership.graph_is_lost:
                raise
            # Something in it frees what it needs: each pass takes a forward pass of its own.
            self.ownership.graph_is_lost = True
            raise Unsettled("a pass can be differentiated once. Run the pass again.") from None
        finally:
            self.projector = None
        return [call.probe for call in calls]

    def _escalate(self, calls: Sequence[Call], found: Sequence[RowOrder]) -> bool:
        """Leave calls with rows that are no one example's to the modules around them.

        Raises:
            DminError: there is none around.
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
