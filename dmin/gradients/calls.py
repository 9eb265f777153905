"""Forward calls with hooks on their output gradients, and the examination of a network by them."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmin.gradients.ownership import MAJOR, UNKNOWN, RowOrder
from dmin.gradients.projections import Projector, order_of, owners_of
from dmin.runtime.errors import DminError

Probe = list[Tensor | None] | None
"""A few numbers of each row, ``[rows, PROJECTIONS]``, of each output; None where none came."""


@dataclass
class Call:
    """One forward call: of a layer, of a module to run again, or an input of the network.

    Attributes:
        number: of its first output among those of the pass.
        name: of the module.
        module: that was called.
        parameters: whose gradients it gives.
        own: names of the parameters that the module holds, by local name.
        how: they are had: a layer's closed form, or the call to be run again.
        shapes: of its outputs.
        dtype: of its outputs.
        features: last axes of an output that make up one row; None: the last, if there are two.
        probe: what was kept of the rows of its output gradients in the latest pass that probes.
    """

    number: int
    name: str
    module: nn.Module
    parameters: set[str]
    own: Mapping[str, str]
    how: Any
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    features: int | None = None
    probe: Probe = None

    @property
    def kind(self) -> Hashable:
        """What tells this call from another: its name and the shapes of its outputs."""
        return self.name, type(self.how).__name__, self.shapes

    def rows(self, output: int) -> torch.Size:
        """Return the axes of an output that its rows are numbered along."""
        shape = self.shapes[output]
        features = min(1, len(shape) - 1) if self.features is None else self.features
        return shape[: len(shape) - features]

    def doubts(
        self, orders: Sequence[RowOrder], gradients: Sequence[Tensor | None]
    ) -> Iterator[Tensor]:
        """Yield, for outputs with rows of unknown owner, whether one of these has a gradient."""
        for i, (order, gradient) in enumerate(zip(orders, gradients, strict=True)):
            unknown = None if gradient is None or order is MAJOR else order.unknown
            if gradient is not None and unknown is not None:
                rows = gradient.flatten(0, len(self.rows(i)) - 1)
                whole = len(unknown) == len(rows)
                yield (rows if whole else rows[unknown.to(rows.device)]).any()

    def take(self, gradients: Sequence[Tensor | None], projector: Projector) -> None:
        """Keep a few numbers of each row of the output gradients of a pass."""
        self.probe = [
            None if g is None else projector(g, g.ndim - len(self.rows(i)))
            for i, g in enumerate(gradients)
        ]

    def orders(
        self, probes: Sequence[Probe], batch: int, base: int, tolerance: float
    ) -> list[RowOrder]:
        """Return the order of the rows of each output.

        Args:
            probes: what was kept of a plain pass, and of one for each digit. Gradients that did
                not come are zero.
            batch: number of examples.
            base: of the digits.
            tolerance: of the ratio of two gradients.
        """
        orders = []
        for i, shape in enumerate(map(self.rows, range(len(self.shapes)))):
            passes = [None if probe is None else probe[i] for probe in probes]
            some = next((p for p in passes if p is not None), None)
            if some is None:
                owners = torch.tensor([UNKNOWN], dtype=torch.int32).expand(shape.numel())
            else:
                plain, *scaled = [torch.zeros_like(some) if p is None else p for p in passes]
                owners = owners_of(plain, scaled, batch, base, tolerance)
            orders.append(order_of(owners, shape, batch))
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
                f"it, so its gradient cannot be computed. Turn the in-place operation off, or "
                f"leave the layer out with params=<regex>."
            ) from error
        ctx.capture.arrive(ctx.call, inputs, gradients)
        return (None, None, None, None, *gradients, *[None] * len(inputs))
