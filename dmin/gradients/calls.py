"""Forward calls whose output gradients are heard of, and the examination of a network by them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dmin.gradients.data_dependence import DataDependence
from dmin.gradients.ownership import UNKNOWN, Projector, RowOrder, order_of, owners_of
from dmin.gradients.parameters import some_of
from dmin.runtime.errors import DminError


@dataclass
class Call:
    """One forward call: of a layer, of a module to run again, or an input of the network.

    Attributes:
        number: of its first output among those of the pass.
        name: of the module.
        module: that was called.
        parameters: whose gradients it gives.
        how: they are had: a layer's closed form, or the call to be run again.
        shapes: of its outputs.
        dtype: of its outputs.
        features: last axes of an output that make up one row; None: the last, if there are two.
    """

    number: int
    name: str
    module: nn.Module
    parameters: set[str]
    how: Any
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    features: int | None = None
    _probes: list[list[Tensor | None]] = field(default_factory=list)

    @property
    def kind(self) -> Hashable:
        """What tells this call from another: its name and the shapes of its outputs."""
        return self.name, type(self.how).__name__, self.shapes

    def rows(self, output: int) -> torch.Size:
        """Return the axes of an output that its rows are numbered along."""
        shape = self.shapes[output]
        features = min(1, len(shape) - 1) if self.features is None else self.features
        return shape[: len(shape) - features]

    def probe(self, gradients: Sequence[Tensor | None], projector: Projector) -> None:
        """Keep a few numbers of each row of the output gradients of a pass."""
        found = [
            None if g is None else projector(g, g.ndim - len(self.rows(i)))
            for i, g in enumerate(gradients)
        ]
        self._probes.append(found)

    def end_probe(self, passes: int) -> None:
        """Take gradients that did not come, in one of so many passes so far, for zero."""
        if len(self._probes) < passes:
            self._probes.append([None] * len(self.shapes))

    def orders(self, batch: int, base: int, tolerance: float) -> list[RowOrder]:
        """Return the order of the rows of each output, from the passes that were probed.

        Args:
            batch: number of examples.
            base: of the digits that the passes after the first spell.
            tolerance: of the ratio of two gradients.
        """
        orders = []
        for i, passes in enumerate(zip(*self._probes, strict=True)):
            shape, some = self.rows(i), next((p for p in passes if p is not None), None)
            if some is None:
                owners = torch.tensor([UNKNOWN], dtype=torch.int16).expand(shape.numel())
            else:
                plain, *scaled = [torch.zeros_like(some) if p is None else p for p in passes]
                owners = owners_of(plain, scaled, batch, base, tolerance)
            orders.append(order_of(owners, shape, batch))
        self._probes.clear()
        return orders


class Tap(torch.autograd.Function):
    """The identity on a call's outputs, which hands their gradients and the inputs to a capture.

    It starts a graph where the outputs have none. The inputs are saved as autograd saves tensors:
    checked for changes in place, freed after backward, recomputed under gradient checkpointing.
    """

    @staticmethod
    def forward(
        ctx: Any, capture: Any, call: Call, anchor: Tensor, outputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Pass the outputs on, and save the inputs."""
        ctx.capture, ctx.call = capture, call
        ctx.save_for_backward(*tensors[outputs:])
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in tensors[:outputs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Pass the gradients on, and show them with the inputs."""
        try:
            inputs = ctx.saved_tensors
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise DminError(
                f"the input of layer {ctx.call.name} was changed in place after the layer used "
                f"it, so its gradient cannot be had. Switch the in-place operation off, or leave "
                f"the layer out with params=<regex>."
            ) from error
        ctx.capture.arrive(ctx.call, inputs, gradients)
        return (None, None, None, None, *gradients, *[None] * len(inputs))


class Examination:
    """Context in which a network is examined: what it does with its inputs.

    Attributes:
        inputs: tensors that the network was given.

    Args:
        capture: that the inputs' gradients are shown to.
        network: to examine.
        anchor: what makes tensors part of a graph.
    """

    def __init__(self, capture: Any, network: nn.Module, anchor: Tensor) -> None:
        self._capture, self._network, self._anchor = capture, network, anchor
        self._noted = DataDependence()
        self.inputs: list[Call] = []
        self._inside = 0

    def __enter__(self) -> Self:
        """Hear when the network's forward begins and ends."""
        with ExitStack() as undo:
            begins = self._network.register_forward_pre_hook(self._begin, with_kwargs=True)
            undo.callback(begins.remove)
            undo.callback(
                self._network.register_forward_hook(self._end, always_call=True).remove
            )
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the network as it was."""
        if self._inside:
            self._noted.__exit__(None, None, None)
        self._undo.close()

    @property
    def depends(self) -> bool:
        """Whether the network took an index or a decision from its inputs."""
        return self._noted.found

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._inside or not torch.is_grad_enabled():
            return None
        args, kwargs = pytree.tree_map(self._tapped, (args, kwargs))
        self._noted.begins(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        self._noted.__enter__()
        self._inside = 1
        return args, kwargs

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._inside:
            self._inside = 0
            self._noted.__exit__(None, None, None)

    def _tapped(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, nn.Parameter):
            return x
        if not x.is_floating_point() or x.ndim == 0:
            return x
        name = f"input {len(self.inputs)} of the network"
        call = Call(-1, name, self._network, set(), None, (x.shape,), x.dtype)
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
            DminError: it does, and between which layers.
        """
        reached = [order for order in inputs if order.reached]
        if not reached or not all(order.shared for order in reached):
            return
        mixed = [c.name for c in calls if any(orders[c.number + i].shared for i in range(len(c.shapes)))]
        statistics = [
            name
            for name, module in self._network.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and (module.training or module.running_mean is None)
        ]
        where = f"{some_of(statistics)} take(s) statistics of the batch" if statistics else (
            f"it happens behind {mixed[-1]}" if mixed else "it happens before the first layer"
        )
        raise DminError(
            f"the examples of a pass see each other in this network: {where}. Set "
            f"collect.microbatch=1, which computes every pair alone."
        )
