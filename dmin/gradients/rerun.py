"""The exact slower path: gradients that have no closed form, by running a module again.

A module that computes with parameters of its own, or with the weights of a layer it does not call,
is run once more for each example on its recorded arguments, and differentiated with the recorded
gradient of its output. Whether an example's rows were cut out rightly is not guessed: what comes
out must be what came out before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dmin.gradients.factors import Dense, GradientFactors, wide_dtype
from dmin.runtime.errors import DminError


class PerExampleRerun:
    """One call of a module, kept so that it can be repeated for one example at a time.

    Args:
        module: the module.
        name: its dotted name, for messages.
        arguments: positional arguments and keywords of the call.
        output: what it returned: tensors, also nested in tuples, lists and dicts.
    """

    def __init__(self, module: nn.Module, name: str, arguments: Any, output: Any) -> None:
        self.module = module
        self.name = name
        leaves, self._structure = pytree.tree_flatten(arguments)
        self._tensor_at = [i for i, leaf in enumerate(leaves) if _is_data(leaf)]
        self._constants = [None if _is_data(leaf) else leaf for leaf in leaves]
        outputs = differentiable(output)
        self._samples = [_sample(tensor) for tensor in outputs]
        kind = outputs[0].device.type
        self._autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self._whole = False  # run all examples and mask, because one example cannot be cut out

    def tensors(self, arguments: Any) -> list[Tensor]:
        """Return the tensors among the arguments, which the caller keeps and later hands back."""
        leaves = pytree.tree_leaves(arguments)
        return [leaves[i] for i in self._tensor_at]

    def factors(
        self,
        inputs: Sequence[Tensor],
        output_gradients: Sequence[Tensor | None],
        parameters: Mapping[str, nn.Parameter],
        batch: int,
        budget: int,
    ) -> dict[str, GradientFactors]:
        """Return the gradients of the parameters for each example.

        All at once where they fit the budget (bytes); else each parameter by itself, a slice of
        examples at a time, when its factors are asked for numbers.
        """
        for gradient in output_gradients:
            if gradient is not None and (gradient.ndim == 0 or len(gradient) % batch):
                raise DminError(
                    f"{self.name} ({type(self.module).__name__}) returns a tensor of shape "
                    f"{tuple(gradient.shape)}, which has no rows for each of {batch} examples, so "
                    f"the gradients of {', '.join(parameters)} cannot be distinguished. Leave them "
                    f"out with params=<regex>."
                )
        work = _Work(self, inputs, output_gradients, batch)
        size = sum(p.numel() * wide_dtype(p).itemsize for p in parameters.values())
        if batch * size > budget:
            return {name: _Lazy(work, p, range(batch)) for name, p in parameters.items()}
        rows = [work.gradients(b, list(parameters.values())) for b in range(batch)]
        columns = zip(*rows, strict=True)
        return {name: Dense(torch.stack(g)) for name, g in zip(parameters, columns, strict=True)}

    def repeat(self, inputs: Sequence[Tensor], rows: slice, batch: int) -> list[Tensor] | None:
        """Run the module on some examples; None when that is not what happened before."""
        leaves = list(self._constants)
        for i, tensor in zip(self._tensor_at, inputs, strict=True):
            cut = tensor.ndim > 0 and len(tensor) == batch
            leaves[i] = tensor[rows] if cut else tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        kind, enabled, dtype = self._autocast
        with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
            try:
                outputs = differentiable(self.module(*args, **kwargs))
            except Exception:  # a tensor was cut that should not have been: any error can follow
                if rows == slice(None):
                    raise
                return None
        pairs = zip(outputs, self._samples, strict=True)
        agree = all(_agree(_sample(out), part(expected, rows, batch)) for out, expected in pairs)
        return outputs if agree else None


@dataclass(frozen=True)
class _Work:
    """A recorded call together with the gradients of its outputs."""

    call: PerExampleRerun
    inputs: Sequence[Tensor]
    output_gradients: Sequence[Tensor | None]
    batch: int

    def gradients(self, b: int, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Return the gradients of some parameters for one example."""
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            outputs = None
            if not self.call._whole:
                outputs = self.call.repeat(self.inputs, slice(b, b + 1), self.batch)
                flows = [
                    None if g is None else part(g, slice(b, b + 1), self.batch)
                    for g in self.output_gradients
                ]
            if outputs is None:
                self.call._whole = True
                outputs = self.call.repeat(self.inputs, slice(None), self.batch)
                flows = [_masked(g, b, self.batch) for g in self.output_gradients]
            if outputs is None:
                raise DminError(
                    f"{self.call.name} ({type(self.call.module).__name__}) gives another output "
                    f"when it is run again on the same arguments, so its gradient cannot be had. "
                    f"Dropout is the usual reason: put the network in eval mode. Otherwise leave "
                    f"its parameters out with params=<regex>."
                )
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


@dataclass(frozen=True)
class _Lazy(GradientFactors):
    """The gradients of one parameter, computed when they are asked for."""

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
    leaves = (output,) if isinstance(output, Tensor) else pytree.tree_leaves(output)
    return [x for x in leaves if _is_differentiable(x)]


def replaced(output: Any, tensors: Sequence[Tensor]) -> Any:
    """Return a module's output with other tensors for its :func:`differentiable` ones."""
    if isinstance(output, Tensor):
        return tensors[0] if tensors else output
    leaves, structure = pytree.tree_flatten(output)
    others = iter(tensors)
    return pytree.tree_unflatten(
        [next(others) if _is_differentiable(x) else x for x in leaves], structure
    )


def part(x: Tensor, rows: slice, batch: int) -> Tensor:
    """Return the rows of some examples, of which each may have several."""
    if rows == slice(None):
        return x
    each = len(x) // batch
    return x[rows.start * each : rows.stop * each]


def _masked(gradient: Tensor | None, b: int, batch: int) -> Tensor | None:
    """Return a gradient with zeros for all examples but one."""
    if gradient is None:
        return None
    masked, rows = torch.zeros_like(gradient), slice(b, b + 1)
    part(masked, rows, batch).copy_(part(gradient, rows, batch))
    return masked


def _is_differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _is_data(leaf: Any) -> bool:
    """A tensor that is not a parameter: those stay themselves, to be differentiated."""
    return isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)


def _sample(x: Tensor, columns: int = 16) -> Tensor:
    """Return a few numbers of each row, to tell whether two runs were the same."""
    flat = x.detach().reshape(len(x), -1) if x.ndim else x.detach().reshape(1, 1)
    return flat[:, :: max(1, flat.shape[1] // columns)].clone()


def _agree(x: Tensor, y: Tensor) -> bool:
    """Equal but for rounding; a wrong cut or a dropped unit is off by the size of x itself."""
    if x.shape != y.shape:
        return False
    tolerance = 1e-2 if x.dtype.itemsize >= 4 else 1e-1
    scale = float(y.abs().amax()) if y.numel() else 0.0
    return torch.allclose(x, y, rtol=0, atol=tolerance * scale, equal_nan=True)
