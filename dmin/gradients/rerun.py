"""The exact but slower path: gradients without a closed form, by running a module again.

A module that computes with parameters of its own, or with the weights of a layer it does not call,
is run once more for each example on its recorded arguments, and differentiated with the recorded
gradient of its output. That the rows of the example were selected correctly is verified:
the output must equal the recorded one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dmin.gradients.factors import Dense, GradientFactors, wide_dtype
from dmin.gradients.ownership import RowOrder
from dmin.runtime.errors import DminError


class OtherOutput(DminError):
    """A module gives another output when it is run again.

    Args:
        call: the call of the module.
    """

    def __init__(self, call: "PerExampleRerun") -> None:
        super().__init__(
            f"{call.name} ({type(call.module).__name__}) fails or returns a different output when "
            "it is run again with the same arguments: dropout is on, or it keeps a state between "
            "calls. Put the network in eval mode, remove that state, or leave its parameters out "
            "with params=<regex>."
        )
        self.module = call.module


class PerExampleRerun:
    """One call of a module, kept so that it can be repeated for one example at a time.

    Args:
        module: the module.
        name: its dotted name, for messages.
        arguments: positional arguments and keywords of the call.
        output: its output: tensors, also nested in tuples, lists, dicts and dataclasses.
        changing: whether the module changes its arguments, so that each run gets copies.
    """

    def __init__(
        self, module: nn.Module, name: str, arguments: Any, output: Any, changing: bool = False
    ) -> None:
        self.changing = changing
        self.module = module
        self.name = name
        leaves, self._structure = pytree.tree_flatten(arguments)
        self._tensor_at = [i for i, leaf in enumerate(leaves) if _is_data(leaf)]
        self._constants = [None if _is_data(leaf) else leaf for leaf in leaves]
        outputs = differentiable(output)
        self._samples = [_sample(tensor) for tensor in outputs]
        kind = outputs[0].device.type
        self._autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self._whole = False  # run all examples and mask, if one example cannot be selected

    def tensors(self, arguments: Any) -> list[Tensor]:
        """Return the tensors among the arguments, which the caller keeps for :meth:`factors`."""
        leaves = pytree.tree_leaves(arguments)
        return [leaves[i] for i in self._tensor_at]

    def factors(
        self,
        inputs: Sequence[Tensor],
        output_gradients: Sequence[Tensor | None],
        parameters: Mapping[str, nn.Parameter],
        orders: Sequence[RowOrder],
        batch: int,
        budget: int,
    ) -> dict[str, GradientFactors]:
        """Return the gradients of the parameters for each example.

        All are computed at once if they fit the budget. Otherwise each parameter is computed
        separately, for some examples at a time, when ``dense()`` of its factors is called.

        Args:
            inputs: the tensors from :meth:`tensors`.
            output_gradients: gradients of the outputs.
            parameters: the current parameters, by name.
            orders: row orders of the outputs.
            batch: number of examples.
            budget: most bytes of gradients in memory at once.
        """
        work = _Work(self, inputs, output_gradients, orders, batch)
        size = sum(p.numel() * wide_dtype(p).itemsize for p in parameters.values())
        if batch * size > budget:
            return {name: _Lazy(work, p, range(batch)) for name, p in parameters.items()}
        rows = [work.gradients(b, list(parameters.values())) for b in range(batch)]
        columns = zip(*rows, strict=True)
        return {name: Dense(torch.stack(g)) for name, g in zip(parameters, columns, strict=True)}

    def repeat(self, inputs: Sequence[Tensor], cut: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Run the module again on its inputs, or on the parts that ``cut`` selects."""
        leaves = list(self._constants)
        for i, tensor in zip(self._tensor_at, inputs, strict=True):
            leaves[i] = cut(tensor).clone() if self.changing else cut(tensor)
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        # Call forward without hooks, since inputs and outputs were recorded between other hooks.
        # A sharded module needs its hooks, which gather its parameters.
        run = self.module if hasattr(type(self.module), "reshard") else self.module.forward
        kind, enabled, dtype = self._autocast
        with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
            return differentiable(run(*args, **kwargs))

    def agrees(self, outputs: Sequence[Tensor]) -> bool:
        """Return whether outputs equal those of the recorded call."""
        return all(map(_agree, map(_sample, outputs), self._samples))


@dataclass
class _Work:
    """A recorded call together with the gradients of its outputs."""

    call: PerExampleRerun
    inputs: Sequence[Tensor]
    output_gradients: Sequence[Tensor | None]
    orders: Sequence[RowOrder]
    batch: int

    def gradients(self, b: int, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Return the gradients of some parameters for one example."""
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            outputs = None if self.call._whole else self._alone(b)
            if outputs is not None:
                flows = [self._part(g, i, b) for i, g in enumerate(self.output_gradients)]
            else:
                self.call._whole = True
                outputs = self._again()
                flows = [self._masked(g, i, b) for i, g in enumerate(self.output_gradients)]
            pairs = [
                (out, flow)
                for out, flow in zip(outputs, flows, strict=True)
                if flow is not None and out.requires_grad
            ]
            found: Sequence[Tensor | None] = [None] * len(parameters)
            if pairs:
                ends, flowing = zip(*pairs, strict=True)
                found = torch.autograd.grad(ends, parameters, flowing, allow_unused=True)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
        return [
            torch.zeros_like(p, dtype=wide_dtype(p))
            if gradient is None
            else gradient.to_dense().to(wide_dtype(p))
            for p, gradient in zip(parameters, found, strict=True)
        ]

    def _alone(self, b: int) -> list[Tensor] | None:
        """Return the outputs for one example; None if they differ from the recorded ones."""
        axes = {order.axis for order in self.orders}
        if None in axes:
            return None
        first = self.orders[0].axis or 0
        try:
            outputs = self.call.repeat(self.inputs, lambda x: _cut(x, first, b, self.batch))
        except Exception:  # any error is possible if a tensor without examples was cut
            return None
        for i, out in enumerate(outputs):
            if axes == {0}:
                agree = _agree(_sample(out), part(self.call._samples[i], 0, b, self.batch))
            else:
                agree = _agree(out, part(self._before[i], self.orders[i].axis or 0, b, self.batch))
            if not agree:
                return None
        return outputs

    def _again(self) -> list[Tensor]:
        """Return the outputs for all examples."""
        try:
            outputs = self.call.repeat(self.inputs, lambda x: x)
        except (DminError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # any error is possible outside the original context
            raise OtherOutput(self.call) from error
        if not self.call.agrees(outputs):
            raise OtherOutput(self.call)
        return outputs

    @cached_property
    def _before(self) -> list[Tensor]:
        """The outputs for all examples; recorded samples suffice only for examples on axis 0."""
        with torch.no_grad():
            return self._again()

    def _part(self, x: Tensor | None, output: int, b: int) -> Tensor | None:
        axis = self.orders[output].axis
        return None if x is None or axis is None else part(x, axis, b, self.batch)

    def _masked(self, gradient: Tensor | None, output: int, b: int) -> Tensor | None:
        """Return an output's gradient with zeros for all examples but one."""
        if gradient is None:
            return None
        order, masked = self.orders[output], torch.zeros_like(gradient)
        if order.axis is not None:
            part(masked, order.axis, b, self.batch).copy_(part(gradient, order.axis, b, self.batch))
            return masked
        rows = gradient.shape[:-1] if gradient.ndim > 1 else gradient.shape
        own = (order.owners == b).to(gradient.device).view(rows)
        return gradient * (own[..., None] if gradient.ndim > 1 else own)


@dataclass(frozen=True)
class _Lazy(GradientFactors):
    """The gradients of one parameter, computed when ``dense`` is called."""

    work: _Work
    parameter: nn.Parameter
    examples: range

    @property
    def batch(self) -> int:
        """Number of examples."""
        return len(self.examples)

    def dense(self) -> Tensor:
        """Return ``[batch, *parameter.shape]``."""
        return torch.stack([self.work.gradients(b, [self.parameter])[0] for b in self.examples])

    def __getitem__(self, examples: slice) -> Self:
        """Return the gradients of some of the examples."""
        return replace(self, examples=self.examples[examples])


def differentiable(output: Any) -> list[Tensor]:
    """Return the tensors of a module's output that a gradient can flow into."""
    leaves = (output,) if isinstance(output, Tensor) else pytree.tree_leaves(_opened(output))
    return [x for x in leaves if _is_differentiable(x)]


def replaced(output: Any, tensors: Sequence[Tensor]) -> Any:
    """Return a module's output with its :func:`differentiable` tensors replaced."""
    if isinstance(output, Tensor):
        return tensors[0] if tensors else output
    if _opened(output) is not output:
        return dataclasses.replace(output, **replaced(_opened(output), tensors))
    leaves, structure = pytree.tree_flatten(output)
    others = iter(tensors)
    return pytree.tree_unflatten(
        [next(others) if _is_differentiable(x) else x for x in leaves], structure
    )


def _opened(output: Any) -> Any:
    """Return a dataclass as a dictionary, which pytree can flatten; others unchanged."""
    if not dataclasses.is_dataclass(output) or isinstance(output, dict | type):
        return output
    return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}


def part(x: Tensor, axis: int, b: int, batch: int) -> Tensor:
    """Return a view of one example's entries along an axis."""
    if batch == 1:
        return x
    each = x.shape[axis] // batch
    return x.narrow(axis, b * each, each)


def _cut(x: Tensor, axis: int, b: int, batch: int) -> Tensor:
    """Return one example's part of an input with an axis of length ``batch``; else the input."""
    for each in (axis, 0):
        if x.ndim > each and x.shape[each] == batch:
            return x.narrow(each, b, 1)
    return x


def _is_differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _is_data(leaf: Any) -> bool:
    """Return whether a leaf is a tensor but not a parameter (which is to be differentiated)."""
    return isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)


def _sample(x: Tensor, columns: int = 16) -> Tensor:
    """Return a few numbers of each row, to compare two runs."""
    flat = x.detach().flatten(1) if x.ndim > 1 else x.detach().reshape(-1, 1)
    return flat[:, :: max(1, flat.shape[1] // columns)].clone()


def _agree(x: Tensor, y: Tensor) -> bool:
    """Return whether x and y are equal up to rounding; wrong rows differ by the size of x."""
    if x.shape != y.shape:
        return False
    tolerance = 1e-2 if x.dtype.itemsize >= 4 else 1e-1
    scale = float(y.abs().amax()) if y.numel() else 0.0
    return torch.allclose(x, y, rtol=0, atol=tolerance * scale, equal_nan=True)
