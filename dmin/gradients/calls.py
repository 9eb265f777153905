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
"""Projections ``[rows, PROJECTIONS]`` of each output's gradient; None if there was none."""


@dataclass
class Call:
    """A forward call of a layer or of a module to run again, or an input of the network.

    Attributes:
        number: index of its first output among all outputs of the pass.
        name: name of the module.
        module: the module that was called.
        parameters: names of the parameters whose gradients are computed from this call.
        own: names of the parameters that the module holds, by local name.
        how: how gradients are computed: a layer's closed form, or a :class:`PerExampleRerun`.
        shapes: shapes of its outputs.
        dtype: dtype of its outputs.
        features: trailing axes of an output that form one row; None: one of two or more axes.
        probe: projections of its output gradients in the latest examining pass.
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
        """What distinguishes this call: name, way of computing gradients, shapes of outputs."""
        return self.name, type(self.how).__name__, self.shapes

    def rows(self, output: int) -> torch.Size:
        """Return the sizes of the leading axes of an output, along which rows are numbered."""
        shape = self.shapes[output]
        features = min(1, len(shape) - 1) if self.features is None else self.features
        return shape[: len(shape) - features]

    def doubts(
        self, orders: Sequence[RowOrder], gradients: Sequence[Tensor | None]
    ) -> Iterator[Tensor]:
        """Yield for each output with rows of unknown owner whether one of these has a gradient."""
        for i, (order, gradient) in enumerate(zip(orders, gradients, strict=True)):
            unknown = None if gradient is None or order is MAJOR else order.unknown
            if gradient is not None and unknown is not None:
                rows = gradient.flatten(0, len(self.rows(i)) - 1)
                whole = len(unknown) == len(rows)
                yield (rows if whole else rows[unknown.to(rows.device)]).any()

    def take(self, gradients: Sequence[Tensor | None], projector: Projector) -> None:
        """Keep projections of each row of the output gradients of a pass."""
        self.probe = [
            None if g is None else projector(g, g.ndim - len(self.rows(i)))
            for i, g in enumerate(gradients)
        ]

    def orders(
        self, probes: Sequence[Probe], batch: int, base: int, tolerance: float
    ) -> list[RowOrder]:
        """Return the order of the rows of each output.

        Args:
            probes: projections of an unscaled pass, and of one pass for each digit. Missing
                gradients count as zero.
            batch: number of examples.
            base: base of the digits.
            tolerance: relative tolerance for the ratio of two gradients.
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
    """The identity on a call's outputs; its backward hands their gradients and inputs to a capture.

    It starts a graph where the outputs have none. Autograd saves the inputs: it checks them for
    changes in place, frees them after backward, and recomputes them under gradient checkpointing.
    """

    @staticmethod
    def forward(
        ctx: Any, capture: Any, call: Call, anchor: Tensor, outputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the outputs, and save the inputs."""
        ctx.capture, ctx.call = capture, call
        ctx.save_for_backward(*tensors[outputs:])
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in tensors[:outputs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hand gradients and inputs to the capture, and return the gradients."""
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
