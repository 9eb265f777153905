"""What the tests of capture share: an oracle, and a sketch that keeps gradients as they are."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dmin.gradients.capture import Capture
from dmin.gradients.ownership import Ownership
from dmin.gradients.parameters import choose_parameters

# Values of each example of a batch: (network, inputs) -> [batch].
Loss = Callable[[nn.Module, dict[str, Any]], Tensor]


class Keep:
    """A sink that keeps every example's gradients, in full, by name."""

    def __init__(self, parameters) -> None:
        self.parameters = parameters

    def begin(self, batch, like, budget=0):
        return SimpleNamespace(kept={}, budget=budget)

    def add(self, state, name, factors):
        assert name not in state.kept, f"{name} was added twice"
        state.kept[name] = factors.dense()

    def finish(self, state):
        return state.kept


def square(network: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The mean square of what the network returns."""
    output = network(**inputs)
    wide = output if output.dtype == torch.float64 else output.float()
    return wide.flatten(1).square().mean(1)


def example(inputs: dict[str, Any], b: int, batch: int) -> dict[str, Any]:
    """The inputs of one example: tensors with ``batch`` rows are cut, the rest is shared."""
    cut = {}
    for key, value in inputs.items():
        batched = isinstance(value, Tensor) and value.ndim and len(value) == batch
        cut[key] = value[b : b + 1] if batched else value
    return cut


def one_at_a_time(network: nn.Module, inputs: dict[str, Any], loss: Loss, batch: int):
    """The slow truth: autograd, an example at a time. Unused parameters have zero gradients."""
    named = {name: p for name, p in network.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for b in range(batch):
        value = loss(network, example(inputs, b, batch)).sum()
        gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
            gradient = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            rows[name].append(gradient)
    return {name: torch.stack(gradients) for name, gradients in rows.items()}


def settled(network, sink, run, budget=None, ownership=None, data=()):
    """What a function of a capture returns, once it is known whose rows are whose."""
    ownership = ownership or Ownership()

    def attempt():
        with Capture(network, sink, budget, ownership, data) as capture:
            return run(capture)

    return ownership.settle(attempt)


def backward(network, sink, values, budget=None):
    """What a sink made of one pass, and the way of each parameter."""
    return settled(network, sink, lambda c: (c.backward(values()), c.coverage), budget)


def captured(network: nn.Module, inputs: dict[str, Any], loss: Loss = square, params: str = "all"):
    """The gradients that Capture sees."""
    parameters = choose_parameters(network, params)
    rows, _ = backward(network, Keep(parameters), lambda: loss(network, inputs))
    for name, shape, _ in parameters.entries:  # what the values do not depend on is not added
        batch = len(next(iter(rows.values())))
        rows.setdefault(name, torch.zeros(batch, *shape))
    return rows


def error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest ‖Δ‖ / max(‖g_layer‖, 1e-4 ‖g‖) of any example and parameter."""
    whole = sum(g.double().reshape(len(g), -1).square().sum(1) for g in truth.values()).sqrt()
    assert (whole > 0).all(), "the test compares nothing"
    worst = 0.0
    for name, gradient in found.items():
        expected = truth[name].double().reshape(len(gradient), -1)
        floor = torch.maximum(expected.norm(dim=1), 1e-4 * whole)
        difference = (gradient.double().reshape(expected.shape) - expected).norm(dim=1)
        worst = max(worst, float((difference / floor).max()))
    return worst


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def check(network: nn.Module, inputs: dict[str, Any], loss: Loss = square, params: str = "all"):
    """Compare Capture with the oracle at the tolerance of the network's dtype."""
    batch = len(next(iter(inputs.values())))
    truth = one_at_a_time(network, inputs, loss, batch)
    found = captured(network, inputs, loss, params)
    assert error(found, truth) <= TOLERANCE[next(network.parameters()).dtype]
    return found
