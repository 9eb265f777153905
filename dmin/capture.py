"""Hooks that turn one backward pass into a sketch of every example's gradient.

Backpropagating a sum of per-example values through a network gives each layer the gradient of its
output, example by example. Together with the layer's input that is the per-example gradient of its
parameters, in factors (:mod:`dmin.layer_gradients`). A :class:`Capture` hands these to the sketch
the moment backward reaches the layer and forgets them, so the full gradient never exists. The
parameters are frozen meanwhile: autograd computes no weight gradients of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dmin.errors import DminError
from dmin.layer_gradients import GradientFactors, Sum, layer_gradient, supported_layers
from dmin.sketches import Parameter, Parameters, Sketch, Sketched
from dmin.sketches.base import Accumulator

# Bytes of per-example gradients in memory at once. On a CPU a slice that fits the last-level cache
# is also the fastest (and is recycled by malloc instead of being mapped afresh each time).
CPU_BUDGET, GPU_BUDGET = 8 << 20, 512 << 20


def choose_parameters(network: nn.Module, params: str = "all") -> Parameters:
    """List the parameters of a network to attribute.

    Args:
        network: any module.
        params: ``all``, or a regular expression searched for in each parameter's dotted name.

    Returns:
        The parameters in the network's order; tied weights once, under their first name.

    Raises:
        DminError: the expression is invalid or matches nothing, or a chosen parameter belongs to a
            layer that dmin cannot differentiate for each example; all such layers are named.
    """
    names = {name: tuple(p.shape) for name, p in network.named_parameters()}
    if params != "all":
        try:
            pattern = re.compile(params)
        except re.error as error:
            raise DminError(f"params={params!r} is not a regular expression: {error}.") from error
        names = {name: shape for name, shape in names.items() if pattern.search(name)}
    if not names:
        some = ", ".join(name for name, _ in list(network.named_parameters())[:5])
        raise DminError(
            f"params={params!r} matches no parameter of {type(network).__name__}. Its parameters "
            f"are named like: {some or '(it has none)'}."
        )
    refused = [
        f"{layer_name or '(the network itself)'} ({type(layer).__name__}: {', '.join(local)})"
        for layer_name, layer, local in _owners(network, set(names))
        if layer_gradient(layer) is None
    ]
    if refused:
        raise DminError(
            f"dmin cannot differentiate {len(refused)} layer(s) example by example: "
            f"{'; '.join(refused[:8])}{' …' if len(refused) > 8 else ''}. Layers it can: "
            f"{', '.join(supported_layers())}. Leave the others out with params=<regex>, which "
            f"names the parameters to keep."
        )
    return Parameters(tuple(Parameter(name, shape) for name, shape in names.items()))


@dataclass
class _Call:
    """One forward call of one layer: what its gradient will need."""

    layer_name: str
    layer: nn.Module
    input: Tensor
    version: int


@dataclass
class _Pass:
    """One backward pass under way."""

    batch: int
    state: Accumulator
    arrived: dict[str, list[GradientFactors]] = field(default_factory=dict)


class Capture:
    """Context in which backward passes give sketched per-example gradients.

    >>> with Capture(network, sketch) as capture:          # sketch bound to the parameters
    ...     prediction = network(x, t)
    ...     rows = capture.backward(((prediction - target) ** 2).mean((1, 2, 3)))
    >>> rows.values, rows.squared_norm                     # [batch, groups, k], [batch, groups]

    Inside, the network's parameters do not require gradients; on leaving, that setting and the
    hooks are as they were before.

    Args:
        network: the module whose parameters are attributed.
        sketch: bound to :func:`choose_parameters` of this network.
        budget: bytes that per-example gradients may take at once (at least one example's gradient
            of one parameter is formed); None for 8 MiB on a CPU, 512 MiB on a GPU.
    """

    def __init__(self, network: nn.Module, sketch: Sketch, budget: int | None = None) -> None:
        self.network = network
        self.sketch = sketch
        self.budget = budget
        self._parameters = sketch._bound
        self._handles: list[RemovableHandle] = []
        self._required: list[tuple[nn.Parameter, bool]] = []
        self._local: dict[str, dict[str, str]] = {}  # layer name -> {local name: canonical name}
        self._uses: dict[str, int] = {}
        self._called: set[str] = set()
        self._pass: _Pass | None = None

    def __enter__(self) -> Self:
        """Freeze the parameters and hook the layers."""
        chosen = {entry.name for entry in self._parameters.entries}
        for name, layer, local in _owners(self.network, chosen):
            self._local[name] = local
            hook = _forward_hook(self, name)
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        self._required = [(p, p.requires_grad) for p in self.network.parameters()]
        for parameter, _ in self._required:
            parameter.requires_grad_(False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the network back as it was."""
        for handle in self._handles:
            handle.remove()
        for parameter, required in self._required:
            parameter.requires_grad_(required)
        self._handles, self._required, self._pass = [], [], None
        self._uses.clear()
        self._called.clear()

    def backward(self, values: Tensor, keep_graph: bool = False) -> Sketched:
        """Backpropagate one value an example and return the sketches of their gradients.

        Args:
            values: ``[batch]``, computed inside this context; value b may depend on example b only.
            keep_graph: another readout of the same forward pass follows.

        Returns:
            Sketches ``[batch, groups, k]`` and squared norms ``[batch, groups]``.

        Raises:
            DminError: a chosen layer was not called in the forward pass, so its gradient would be
                missing without a word; or its input was changed in place.
        """
        silent = [name for name in self._local if name not in self._called]
        if silent:
            raise DminError(
                f"{len(silent)} layer(s) with attributed parameters were never called, so their "
                f"gradients would be missing: {', '.join(silent[:8])}. Either the model uses their "
                f"weights without calling them, or does not use them in this configuration. Leave "
                f"them out with params=<regex>."
            )
        like = values.new_zeros((), dtype=values.dtype if values.dtype.itemsize == 8 else None)
        like = like if like.dtype == torch.float64 else like.float()
        budget = self.budget or (GPU_BUDGET if values.is_cuda else CPU_BUDGET)
        self._pass = _Pass(len(values), self.sketch.begin(len(values), like, budget))
        values.sum().backward(retain_graph=keep_graph)
        for name in list(self._pass.arrived):  # calls whose output the values do not depend on
            self._flush(name)
        rows = self.sketch.finish(self._pass.state)
        self._pass = None
        if not keep_graph:
            self._uses.clear()
            self._called.clear()
        return rows

    def _record(self, name: str, layer: nn.Module, a: Tensor, output: Tensor) -> Tensor:
        """Note a forward call and arrange to hear of the gradient of its output."""
        if not torch.is_grad_enabled():
            raise RuntimeError("Capture needs torch.enable_grad() around the forward pass")
        call = _Call(name, layer, a.detach(), a._version)
        self._called.add(name)
        for canonical in self._local[name].values():
            self._uses[canonical] = self._uses.get(canonical, 0) + 1
        if not output.requires_grad:  # nothing upstream is trainable: the graph starts here
            output = _Root.apply(output, torch.ones((), requires_grad=True))
        output.register_hook(lambda gradient: self._arrive(call, gradient))
        return output

    def _arrive(self, call: _Call, output_gradient: Tensor) -> None:
        """Take the gradient of a layer's output; flush parameters whose last call this was."""
        if self._pass is None:
            return
        if call.input._version != call.version:
            raise DminError(
                f"the input of layer {call.layer_name} was changed in place after the layer used "
                f"it, so its gradient cannot be had. Switch the in-place operation off, or leave "
                f"the layer out with params=<regex>."
            )
        gradient = layer_gradient(call.layer)
        assert gradient is not None  # choose_parameters refused the others
        factors = gradient(call.layer, call.input, output_gradient.detach(), self._pass.batch)
        for local, canonical in self._local[call.layer_name].items():
            arrived = self._pass.arrived.setdefault(canonical, [])
            arrived.append(factors[local])
            if len(arrived) == self._uses[canonical]:
                self._flush(canonical)

    def _flush(self, name: str) -> None:
        """Sketch one parameter's gradients and forget them."""
        assert self._pass is not None
        parts = self._pass.arrived.pop(name)
        self.sketch.add(self._pass.state, name, parts[0] if len(parts) == 1 else Sum(parts))


class _Root(torch.autograd.Function):
    """Start a graph at a tensor that has none, without a leaf that would collect a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _forward_hook(capture: Capture, name: str) -> Any:
    def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        a = args[0] if args else next(iter(kwargs.values()))
        return capture._record(name, layer, a, output)

    return hook


def _owners(
    network: nn.Module, chosen: set[str]
) -> Iterator[tuple[str, nn.Module, dict[str, str]]]:
    """Yield each module that holds chosen parameters itself: name, module, {local: canonical}.

    A module shared between two places is yielded once; a weight shared between two modules is
    yielded with both, under its one canonical name.
    """
    canonical = {id(p): name for name, p in network.named_parameters()}
    for name, layer in network.named_modules():
        local = {
            key: canonical[id(p)]
            for key, p in layer.named_parameters(recurse=False)
            if canonical[id(p)] in chosen
        }
        if local:
            yield name, layer, local
