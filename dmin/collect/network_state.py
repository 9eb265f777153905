"""What a network holds between two passes, which must be the same after each."""

import random
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dmin.gradients.parameters import named_parameters, some_of
from dmin.runtime.errors import DminError

# Numbers of a buffer up to which it is kept; larger ones are weights rather than a state.
STATE = 1 << 24


class NetworkState:
    """Parameters, buffers and random numbers of a network, which its passes must not change.

    Else a row would depend on the passes before it, and the user's network would be another one
    after a collection.

    Args:
        network: whose buffers are kept, to be given back.
        attributed: names of the parameters whose gradients are computed.
    """

    def __init__(self, network: nn.Module, attributed: Collection[str] = ()) -> None:
        self._network = network
        named = named_parameters(network)
        self._attributed = {id(named[name]): name for name in attributed}
        self._made = dict(_made_of(network, self._attributed))
        self._buffers = {
            name: buffer.detach().clone()
            for name, buffer in network.named_buffers()
            if buffer.numel() <= STATE
        }
        self._versions: dict[str, int] = {}
        self._random: list[Any] = []

    def begin(self) -> None:
        """Take the random numbers as they are before a pass, the parameters before the first."""
        if not self._versions:
            self._versions = {n: p._version for n, p in self._network.named_parameters()}
        self._random = self._generators()

    def require_unchanged(self) -> None:
        """Refuse a network that changes what it holds; its buffers are given back.

        Raises:
            DminError: with the names; or it draws random numbers, or computes with tensors that
                were made of parameters before.
        """
        after = dict(_made_of(self._network, self._attributed))
        stay = [key for key, tensor in self._made.items() if after.get(key) is tensor]
        if stay:
            raise DminError(
                f"the network holds tensors computed from its parameters before the pass: "
                f"{some_of(stay)}. Their part of the gradient would be missing. Compute them in "
                f"forward, or keep them as constants (.detach())."
            )
        if self._random != self._generators():
            raise DminError(
                "the network draws random numbers while it runs, so gradients of examples and "
                "queries cannot be compared. Switch off dropout in eval mode; draw intended noise, "
                "the same for all examples, from a torch.Generator with a fixed seed."
            )
        changed = [
            n for n, p in self._network.named_parameters() if p._version != self._versions[n]
        ]
        for name, buffer in self._network.named_buffers():
            kept = self._buffers.get(name)
            if kept is None or kept.shape != buffer.shape:
                continue  # a table that is remade
            before = kept.to(buffer)
            same = (before == buffer) | ((before != before) & (buffer != buffer))  # NaN is NaN
            if not bool(same.all()):
                changed.append(name)
                buffer.detach().copy_(kept)
        if changed:
            raise DminError(
                f"the network's forward changes its own parameters or buffers: {some_of(changed)}. "
                "Switch that off in eval mode; for max_norm of nn.Embedding, renormalise once "
                "before and set it to None."
            )

    def _generators(self) -> list[Any]:
        """Return the states of the generators of torch, NumPy and Python that networks share."""
        device = next(self._network.parameters()).device
        states = [torch.get_rng_state().numpy().tobytes()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
        numbers: Any = np.random.get_state()
        return [*states, hash(random.getstate()), numbers[1].tobytes(), *numbers[2:]]


def _made_of(network: nn.Module, parameters: dict[int, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that modules hold and that autograd takes for functions of parameters."""
    for module_name, module in network.named_modules():
        held = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_modules")}
        held |= held.pop("_buffers")
        for path, leaf in pytree.tree_leaves_with_path(held):
            if not isinstance(leaf, Tensor) or id(leaf) in parameters:
                continue
            base = leaf if leaf._base is None else leaf._base  # of a view
            source = parameters.get(id(base)) or _source(base, parameters)
            if source:
                yield f"{module_name}{pytree.keystr(path)} (from {source})", leaf


def _source(tensor: Tensor, parameters: dict[int, str]) -> str | None:
    """Return the name of a parameter from which a tensor was computed, by its graph."""
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if id(variable) in parameters:
            return parameters[id(variable)]
        waiting += [each for each, _ in node.next_functions]
    return None
