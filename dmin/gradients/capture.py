"""Hooks that turn one backward pass into a sketch of every example's gradient.

Backpropagating a sum of per-example values through a network gives each layer the gradient of its
output, example by example. Together with the layer's input that is the per-example gradient of its
parameters, in factors (:mod:`dmin.gradients.factors`). A :class:`Capture` hands these to a sink
(:mod:`dmin.gradients.sink`) as soon as backward reaches the layer and then frees them, so
the full gradient never exists. The parameters are frozen meanwhile, so that autograd computes no
weight gradients.

Which example a row of a layer belongs to is found by examination (:mod:`dmin.gradients.ownership`),
and every use of a parameter is recorded (:mod:`dmin.gradients.usage`). If a parameter is used
otherwise than by the forward of a layer with a closed form, the module that used it is run again,
one example at a time (:mod:`dmin.gradients.rerun`).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Generic, Self

import torch
from torch import Tensor, nn

from dmin.gradients.backward_pass import UNUSED, BackwardPass
from dmin.gradients.calls import Call, Tap
from dmin.gradients.examination import Examination, Prober, kind_of
from dmin.gradients.factors import wide_dtype
from dmin.gradients.layers import features_of, layer_gradient
from dmin.gradients.ownership import Ownership, RowOrder, Unsettled
from dmin.gradients.parameters import eager, named_parameters, some_of, uncompiled
from dmin.gradients.rerun import OtherOutput, PerExampleRerun, differentiable, replaced
from dmin.gradients.sink import Rows, Sink, State
from dmin.gradients.usage import ParameterUsage, Use
from dmin.runtime.errors import DminError

# Bytes of per-example gradients in memory at once. On a CPU a slice that fits the last-level cache
# is also the fastest (and malloc reuses its memory instead of mapping new pages each time).
CPU_BUDGET, GPU_BUDGET = 8 << 20, 512 << 20

# Parameters of layers with a closed form.
_LOCAL = "weight", "bias"


class Capture(Generic[State, Rows]):
    """Context in which backward passes return sketched per-example gradients.

    >>> ownership = Ownership()  # one for all passes of a network
    >>> def run():
    ...     with Capture(network, sketch, ownership=ownership) as capture:  # a bound sketch
    ...         prediction = network(x, t)
    ...         return capture.backward(((prediction - target) ** 2).mean((1, 2, 3)))
    >>> rows = ownership.settle(run)
    >>> rows.values, rows.squared_norm                     # [batch, groups, k], [batch, groups]

    Inside, the network's parameters do not require gradients, and compiled code runs eagerly. On
    exit, these settings and the hooks are restored.

    Args:
        network: the module whose parameters are attributed.
        sink: receives factors, such as a sketch bound to :func:`choose_parameters` of the network.
        budget: most bytes of per-example gradients in memory at once (at least one example's
            gradient of one parameter is formed); None for 8 MiB on a CPU, 512 MiB on a GPU.
        ownership: what is known about the owners of the network's rows; findings are added.
        data: tensors that code outside the network may use to order the rows of its inputs.
    """

    def __init__(
        self,
        network: nn.Module,
        sink: Sink[State, Rows],
        budget: int | None = None,
        ownership: Ownership | None = None,
        data: Iterable[Tensor] = (),
    ) -> None:
        self.data: tuple[Tensor, ...] = tuple(data)
        self.network: nn.Module = uncompiled(network)
        self.sink = sink
        self.budget = budget
        self.ownership: Ownership = ownership or Ownership()
        named = named_parameters(self.network)
        self._chosen = {entry.name: named[entry.name] for entry in sink.parameters.entries}
        self._usage: ParameterUsage[Call] = ParameterUsage(
            self.network,
            self._chosen,
            self._record,
            self.ownership.by_network,
            self.ownership.changing,
        )
        self._paths: defaultdict[str, set[str]] = defaultdict(set)
        self._pass: BackwardPass[State, Rows] | None = None
        self._prober = Prober(self.ownership, self.network, self._backpropagate)
        self._forget()

    def __enter__(self) -> Self:
        """Freeze the parameters and install the hooks."""
        hooked = [name for name, p in self._chosen.items() if p._backward_hooks]
        if hooked:
            raise DminError(
                f"{len(hooked)} parameter(s) have hooks that change their gradients: "
                f"{some_of(hooked)}. Remove them (the handle of Tensor.register_hook), or leave "
                f"the parameters out with params=<regex>."
            )
        self._anchor = torch.ones((), requires_grad=True)
        with ExitStack() as undo:
            undo.enter_context(eager())
            self._examination = None
            if self.ownership.watch:
                self._examination = Examination(self, self.network, self._anchor, self.data)
                undo.enter_context(self._examination)
            undo.enter_context(self._usage)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the network."""
        self._undo.close()
        self._forget()

    def _forget(self) -> None:
        self._calls: list[Call] = []  # of the forward passes, in order
        self._uses: Counter[str] = Counter()  # per parameter: calls whose gradients are expected
        self._orders: dict[int, RowOrder] | None = None

    @property
    def coverage(self) -> dict[str, str]:
        """How each chosen parameter's gradient was computed in the backward passes so far.

        ``closed form``, ``per-example rerun (<module>)``, both, or ``unused`` if the values do not
        depend on the parameter, so that its gradient is zero.
        """
        return {name: " + ".join(sorted(self._paths[name])) or UNUSED for name in self._chosen}

    def backward(self, values: Tensor, keep_graph: bool = False) -> Rows:
        """Backpropagate one value per example and return the sink's result.

        Args:
            values: ``[batch]``, computed inside this context; value b may depend on example b only.
            keep_graph: keep the graph for another readout of the same forward pass.

        Returns:
            The result of the sink's ``finish``; for a sketch, rows ``[batch, groups, k]`` and
            squared norms ``[batch, groups]``.

        Raises:
            DminError: the gradient of a chosen parameter cannot be computed; the message names it.
            Unsettled: the pass found new facts about owners and has to be run again.
        """
        if self._examination is not None:
            self._examination.forward_done()
        self._require_distinguished()
        if values.ndim != 1 or not values.requires_grad:
            raise DminError(
                f"the loss must be one value for each example and depend on the network's "
                f"parameters; it has shape {tuple(values.shape)} and "
                f"{'a' if values.requires_grad else 'no'} gradient. Is it summed, or detached?"
            )
        like = values.detach().new_zeros((), dtype=wide_dtype(values))
        budget = self.budget or (GPU_BUDGET if values.is_cuda else CPU_BUDGET)
        batch = len(values)
        first = self._orders is None
        if first:
            self.ownership.latest = kind_of(batch, self._usage.scalars, self._calls)
            self.ownership.called = tuple(call.name for call in self._calls)
        orders = self._orders or {}
        if batch > 1 and (first or self.ownership.routed):
            orders = self._prober.orders(values, self._calls, self._examination)
        self._orders = orders
        self._pass = BackwardPass(
            self.sink, self._usage, self._uses, orders, like, batch, budget, self._paths
        )
        try:
            self._backpropagate(values, keep_graph)
            self._pass.flush_incomplete()
            self._require_known(self._pass.doubt, first)
            rows = self.sink.finish(self._pass.state)
        except OtherOutput as error:
            rerun = [c for c in self._calls if isinstance(c.how, PerExampleRerun)]
            alike = {c.name for c in rerun if type(c.module) is type(error.module)}
            if not self.ownership.repeat_otherwise({c.name for c in rerun}, alike - {""}, error):
                raise self.ownership.unlike or error from None
            raise Unsettled(str(error)) from error
        finally:
            self._pass = None
        if not keep_graph:
            self._usage.forget()
            self._forget()
        return rows

    def _backpropagate(self, values: Tensor, keep_graph: bool) -> None:
        with self._usage.replaying():
            torch.autograd.backward(values.sum(), inputs=[self._anchor], retain_graph=keep_graph)

    def _require_distinguished(self) -> None:
        if self._usage.lost:
            lost = [f"{name} ({why})" for name, why in self._usage.lost.items()]
            raise DminError(
                f"the gradients of {len(lost)} parameter(s) cannot be separated by example: "
                f"{some_of(lost)}. Compute every pair alone with collect.microbatch=1; parameters "
                f"used outside of the network must be used in its forward, or be detached."
            )

    def _require_known(self, doubt: Tensor | None, first: bool) -> None:
        """Require another examination if rows of unknown owner had gradients."""
        if self.ownership.agree(doubt is not None and bool(doubt)):
            if first:
                self.ownership.doubt(self.ownership.latest)
            else:  # another readout depends on rows that the first does not
                self.ownership.route()
            raise Unsettled("rows of layers have gradients for the first time. Run the pass again.")

    def _record(self, use: Use[Call]) -> tuple[Any, Call] | None:
        """Tap a call's outputs to receive their gradients; None if these cannot be used."""
        if not torch.is_grad_enabled():
            raise DminError(
                f"{use.name or 'the network'} ran without gradients, so the gradients "
                f"of {some_of(use.used)} would be missing. Remove torch.no_grad from the model; "
                f"gradient checkpointing needs use_reentrant=False."
            )
        outputs = differentiable(use.output)
        if any(x.is_nested or _wrapped(x) for x in outputs):
            raise DminError(
                f"layer {use.name or 'the network'} runs inside torch.vmap or on nested tensors, "
                f"where rows do not belong to single examples. Call it on a batch instead "
                f"(examples along the first axis, padded if necessary), or leave it out with "
                f"params=<regex>."
            )
        call = self._call(use)
        if call is None:
            return None
        if isinstance(call.how, PerExampleRerun):
            inputs = [x.detach() for x in call.how.tensors((use.args, use.kwargs))]
            for inner in use.within:  # their gradients come from running this module again
                self._uses.subtract(inner.parameters & call.parameters)
                inner.parameters -= call.parameters
        else:
            inputs = [_input(use).detach()]
        # Otherwise a checkpoint recomputes a call that is already counted.
        if self._pass is None and self._prober.projector is None:
            self._uses.update(call.parameters)
            self._calls.append(call)
        tapped = Tap.apply(self, call, self._anchor, len(outputs), *outputs, *inputs)
        return replaced(use.output, tapped), call

    def _call(self, use: Use[Call]) -> Call | None:
        """Return the call and how its per-example gradients are computed; None if they cannot."""
        if use.name in self.ownership.enclosing and use.module is not self.network:
            return None
        last, gradient = self._calls[-1] if self._calls else None, layer_gradient(use.module)
        number = last.number + len(last.shapes) if last else 0
        outputs = differentiable(use.output)
        shapes = tuple(x.shape for x in outputs)
        own = self._usage.own(use.module)
        plain = use.used <= {name for local, name in own.items() if local in _LOCAL}
        if gradient is not None and plain and isinstance(use.output, Tensor):
            features = features_of(use.module, use.output)
            if not self._sees(use, [_input(use)]) or use.output.ndim <= features:
                return None
            how: Any = gradient
        else:
            batch, features = self._usage.batch or 1, None
            apart = batch == 1 or all(any(n % batch == 0 for n in shape) for shape in shapes)
            if not outputs or not apart:
                return None
            changing = use.name in self.ownership.changing
            told = use.module, use.name or "the network", (use.args, use.kwargs), use.output
            how = PerExampleRerun(*told, changing)
            if not self._sees(use, how.tensors((use.args, use.kwargs))):
                return None
        dtype = outputs[0].dtype
        return Call(number, use.name, use.module, use.used, own, how, shapes, dtype, features)

    def _sees(self, use: Use[Call], inputs: Iterable[Tensor]) -> bool:
        known = use.name in self.ownership.distinguished
        return known or any(map(self._usage.sees_examples, inputs))

    def arrive(self, call: Call, inputs: Sequence[Tensor], gradients: Sequence[Any]) -> None:
        """Receive the gradients of a call's outputs."""
        if self._prober.projector is not None:
            call.take(gradients, self._prober.projector)
        elif self._pass is not None and call.parameters:
            self._pass.arrive(call, inputs, gradients)


_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def _input(use: Use[Call]) -> Tensor:
    """Return the input of a layer with a single input."""
    given = use.args[0] if use.args else use.kwargs.get("input")
    return next(iter(use.kwargs.values())) if given is None else given
