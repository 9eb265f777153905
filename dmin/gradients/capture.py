"""Hooks that turn one backward pass into a sketch of every example's gradient.

Backpropagating a sum of per-example values through a network gives each layer the gradient of its
output, example by example. Together with the layer's input that is the per-example gradient of its
parameters, in factors (:mod:`dmin.gradients.factors`). A :class:`Capture` hands these to a sink
(:mod:`dmin.gradients.sink`) the moment backward reaches the layer and forgets them, so the full
gradient never exists. The parameters are frozen meanwhile: autograd computes no weight gradients of
its own.

No use of a parameter goes unseen (:mod:`dmin.gradients.usage`). Where it is not a layer with a
closed form at its own work, the module that used it is run again, an example at a time
(:mod:`dmin.gradients.rerun`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Self

import torch
from torch import Tensor, nn

from dmin.gradients.factors import GradientFactors, Sum, wide_dtype
from dmin.gradients.layers import LayerGradient, layer_gradient, splits
from dmin.gradients.parameters import some_of
from dmin.gradients.rerun import PerExampleRerun, differentiable, replaced
from dmin.gradients.sink import Rows, Sink, State
from dmin.gradients.usage import ParameterUsage, Use
from dmin.runtime.errors import DminError

# Bytes of per-example gradients in memory at once. On a CPU a slice that fits the last-level cache
# is also the fastest (and is recycled by malloc instead of being mapped afresh each time).
CPU_BUDGET, GPU_BUDGET = 8 << 20, 512 << 20

CLOSED_FORM, FALLBACK, UNUSED = "closed form", "fallback", "unused"


@dataclass
class _Call:
    """One forward call whose gradients are to come: of a layer, or of a module to run again."""

    name: str
    module: nn.Module
    parameters: set[str]
    how: LayerGradient | PerExampleRerun


@dataclass
class _Pass(Generic[State]):
    """One backward pass under way."""

    batch: int
    budget: int
    state: State
    arrived: dict[str, list[GradientFactors]] = field(default_factory=dict)


class Capture(Generic[State, Rows]):
    """Context in which backward passes give sketched per-example gradients.

    >>> with Capture(network, sketch) as capture:          # sketch bound to the parameters
    ...     prediction = network(x, t)
    ...     rows = capture.backward(((prediction - target) ** 2).mean((1, 2, 3)))
    >>> rows.values, rows.squared_norm                     # [batch, groups, k], [batch, groups]

    Inside, the network's parameters do not require gradients; on leaving, that setting and the
    hooks are as they were before.

    Args:
        network: the module whose parameters are attributed.
        sink: of factors, such as a sketch, for :func:`choose_parameters` of this network.
        budget: bytes that per-example gradients may take at once (at least one example's gradient
            of one parameter is formed); None for 8 MiB on a CPU, 512 MiB on a GPU.
    """

    def __init__(
        self, network: nn.Module, sink: Sink[State, Rows], budget: int | None = None
    ) -> None:
        self.network = network
        self.sink = sink
        self.budget = budget
        named = dict(network.named_parameters())
        self._chosen = {entry.name: named[entry.name] for entry in sink.parameters.entries}
        self._usage: ParameterUsage[_Call] = ParameterUsage(network, self._chosen, self._record)
        self._paths: dict[str, set[str]] = defaultdict(set)
        self._calls: Counter[str] = Counter()  # of each parameter, whose gradients are to come
        self._pass: _Pass[State] | None = None

    def __enter__(self) -> Self:
        """Freeze the parameters and watch the network."""
        self._anchor = torch.ones((), requires_grad=True)
        self._usage.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Give the network back as it was."""
        self._usage.__exit__(*error)
        self._calls.clear()

    @property
    def coverage(self) -> dict[str, str]:
        """How each chosen parameter's gradient was had in the backward passes so far.

        ``closed form``, ``fallback (<module that is run again>)``, both, or ``unused`` where the
        values do not depend on the parameter, so that its gradient is zero.
        """
        return {name: " + ".join(sorted(self._paths[name])) or UNUSED for name in self._chosen}

    def backward(self, values: Tensor, keep_graph: bool = False) -> Rows:
        """Backpropagate one value an example and return what the sink made of their gradients.

        Args:
            values: ``[batch]``, computed inside this context; value b may depend on example b only.
            keep_graph: another readout of the same forward pass follows.

        Returns:
            Whatever the sink's ``finish`` returns; of a sketch, the rows ``[batch, groups, k]`` and
            squared norms ``[batch, groups]``.

        Raises:
            DminError: the gradient of a chosen parameter cannot be had; the message names it.
        """
        if self._usage.lost:
            lost = [f"{name} ({why})" for name, why in self._usage.lost.items()]
            raise DminError(
                f"the gradients of {len(lost)} parameter(s) cannot be distinguished by example: "
                f"{some_of(lost)}. Leave them out with params=<regex>."
            )
        if values.ndim != 1 or not values.requires_grad:
            raise DminError(
                f"the loss must be one value an example that depends on the network's parameters; "
                f"it has shape {tuple(values.shape)} and "
                f"{'a' if values.requires_grad else 'no'} gradient. Is it summed, or detached?"
            )
        like = values.detach().new_zeros((), dtype=wide_dtype(values))
        budget = self.budget or (GPU_BUDGET if values.is_cuda else CPU_BUDGET)
        batch = len(values)
        self._pass = _Pass(batch, budget, self.sink.begin(batch, like, budget))
        try:
            with self._usage.replaying():
                torch.autograd.backward(
                    values.sum(), inputs=[self._anchor], retain_graph=keep_graph
                )
            with self._usage.off():  # modules may be run again
                for name in list(self._pass.arrived):  # some of their calls did not matter
                    self._flush(name)
            rows = self.sink.finish(self._pass.state)
        finally:
            self._pass = None
        if not keep_graph:
            self._usage.forget()
            self._calls.clear()
        return rows

    def _record(self, use: Use[_Call]) -> tuple[Any, _Call] | None:
        """Arrange to hear of the gradients of a call's outputs; None if they do not help."""
        if not torch.is_grad_enabled():
            raise DminError(
                f"{use.name or 'the network'} ran without gradients, so those of "
                f"{some_of(use.used)} would be missing. Remove torch.no_grad from the model; "
                f"gradient checkpointing needs use_reentrant=False."
            )
        how = self._how(use)
        if how is None:
            return None
        call = _Call(use.name, use.module, use.used, how)
        if isinstance(how, PerExampleRerun):
            inputs = [x.detach() for x in how.tensors((use.args, use.kwargs))]
            for inner in use.within:  # running again covers these as well
                self._calls.subtract(inner.parameters & call.parameters)
                inner.parameters -= call.parameters
        else:
            inputs = [_input(use).detach()]
        if self._pass is None:  # else a checkpoint recomputes what is counted already
            self._calls.update(call.parameters)
        outputs = differentiable(use.output)
        tapped = _Tap.apply(self, call, self._anchor, len(outputs), *outputs, *inputs)
        return replaced(use.output, tapped), call

    def _how(self, use: Use[_Call]) -> LayerGradient | PerExampleRerun | None:
        """Return how the gradients of a call can be had, or None if not example by example."""
        gradient, batch = layer_gradient(use.module), self._usage.batch
        own = set(self._usage.own(use.module).values())
        if gradient is not None and use.used <= own and isinstance(use.output, Tensor):
            a = _input(use)
            known = self._usage.sees_examples(a) and (batch is None or splits(use.module, a, batch))
            return gradient if known else None
        batch, outputs = batch or 1, differentiable(use.output)
        if not outputs or any(len(x) % batch if x.ndim else batch > 1 for x in outputs):
            return None
        rerun = PerExampleRerun(
            use.module, use.name or "the network", (use.args, use.kwargs), use.output
        )
        known = any(self._usage.sees_examples(x) for x in rerun.tensors((use.args, use.kwargs)))
        return rerun if known else None

    def _arrive(self, call: _Call, inputs: Sequence[Tensor], gradients: Sequence[Any]) -> None:
        """Take the gradients of a call's outputs; flush parameters whose last call this was."""
        if self._pass is None or not call.parameters:
            return
        batch, how = self._pass.batch, call.how
        factors: dict[str, GradientFactors]
        if isinstance(how, PerExampleRerun):
            path = f"{FALLBACK} ({how.name})"
            parameters = self._usage.now(call.parameters)
            with self._usage.off():
                factors = how.factors(inputs, gradients, parameters, batch, self._pass.budget)
        else:
            path = CLOSED_FORM
            if not splits(call.module, inputs[0], batch):
                raise DminError(
                    f"layer {call.name} was given {tuple(inputs[0].shape)} for {batch} examples, "
                    f"which cannot be distinguished. Leave it out with params=<regex>."
                )
            parts = how(call.module, inputs[0], gradients[0], batch)
            local = {name: key for key, name in self._usage.own(call.module).items()}
            factors = {name: parts[local[name]] for name in call.parameters}
        with self._usage.off():  # modules may be run again
            for name in sorted(call.parameters):
                self._paths[name].add(path)
                arrived = self._pass.arrived.setdefault(name, [])
                arrived.append(factors[name])
                if len(arrived) == self._calls[name]:
                    self._flush(name)

    def _flush(self, name: str) -> None:
        """Hand one parameter's gradients to the sink and forget them."""
        assert self._pass is not None
        parts = self._pass.arrived.pop(name)
        self.sink.add(self._pass.state, name, parts[0] if len(parts) == 1 else Sum(parts))


class _Tap(torch.autograd.Function):
    """The identity on a call's outputs, which hands their gradients and the inputs to a capture.

    It starts a graph where the outputs have none. The inputs are saved as autograd saves tensors:
    checked for changes in place, freed after backward, recomputed under gradient checkpointing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        capture: Capture[Any, Any],
        call: _Call,
        anchor: Tensor,
        outputs: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.capture, ctx.call = capture, call
        ctx.save_for_backward(*tensors[outputs:])
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in tensors[:outputs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
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
        ctx.capture._arrive(ctx.call, inputs, gradients)
        return (None, None, None, None, *gradients, *[None] * len(inputs))


def _input(use: Use[_Call]) -> Tensor:
    """Return the input of a layer that takes one."""
    return use.args[0] if use.args else next(iter(use.kwargs.values()))
