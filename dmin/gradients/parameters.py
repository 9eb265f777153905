"""Which parameters of a network are attributed."""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from dmin.runtime.errors import DminError

LORA = r"\.(lora_\w+|lokr_\w+|hada|learned)\."  # names in peft, in LyCORIS, of learned words


class Parameter(NamedTuple):
    """One attributed parameter: its name, shape, and the group to which its gradient is added."""

    name: str
    shape: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True)
class Parameters:
    """The attributed parameters of a model, in order.

    Args:
        entries: one entry per parameter; tied weights appear once, under their first name.
        groups: names of the groups; each has its own k dimensions.
    """

    entries: tuple[Parameter, ...]
    groups: tuple[str, ...] = ("model",)

    @cached_property
    def by_name(self) -> dict[str, Parameter]:
        """The entries by name."""
        return {entry.name: entry for entry in self.entries}

    @cached_property
    def count(self) -> int:
        """Number of attributed scalars, P."""
        return sum(prod(entry.shape) for entry in self.entries)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Position of each parameter's first scalar in the concatenation of all."""
        offsets, position = {}, 0
        for entry in self.entries:
            offsets[entry.name] = position
            position += prod(entry.shape)
        return offsets


def choose_parameters(network: nn.Module, params: str = "all") -> Parameters:
    """List the parameters of a network to attribute.

    Args:
        network: any module.
        params: ``all``; ``lora`` for only the adapter; or a regular expression that is searched
            for in each parameter's dotted name.

    Returns:
        The parameters in the network's order; tied weights once, under their first name.

    Raises:
        DminError: the expression is invalid or matches nothing, or a chosen parameter cannot be
            differentiated because it is quantised or in a scripted module.
    """
    named = named_parameters(network)
    if params != "all":
        try:
            pattern = re.compile(LORA if params == "lora" else params)
        except re.error as error:
            raise DminError(
                f"collect.params={params!r} is not a regular expression: {error}."
            ) from error
        chosen = {name: p for name, p in named.items() if pattern.search(name)}
    else:
        chosen = named
    if not chosen:
        some = ", ".join(list(named)[:5])
        raise DminError(
            f"collect.params={params!r} matches no parameter of {type(network).__name__}. "
            f"{'Load the LoRA with model.adapter=<file>. ' if params == 'lora' else ''}"
            f"Its parameters are named like: {some or '(it has none)'}."
        )
    refused = {f"{name} ({p.dtype})" for name, p in chosen.items() if not p.is_floating_point()}
    for name, module in uncompiled(network).named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            prefix = f"{name}." if name else ""
            refused |= {f"{key} (scripted)" for key in chosen if key.startswith(prefix)}
    if refused:
        raise DminError(
            f"dmin cannot differentiate {len(refused)} parameter(s): {some_of(refused)}. Load the "
            f"model unquantised and not compiled, or leave them out with params=<regex>, which "
            f"selects the parameters to attribute."
        )
    return Parameters(tuple(Parameter(name, tuple(p.shape)) for name, p in chosen.items()))


def in_chunks(entries: Iterable[Parameter], scalars: int) -> Iterator[list[Parameter]]:
    """Yield consecutive parameters with at most ``scalars`` scalars in total; at least one."""
    chunk: list[Parameter] = []
    for entry in entries:
        if chunk and sum(prod(each.shape) for each in [*chunk, entry]) > scalars:
            yield chunk
            chunk = []
        chunk.append(entry)
    yield chunk


def uncompiled(network: nn.Module) -> nn.Module:
    """Return the original module of a compiled one, or the network itself."""
    inner = getattr(network, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else network


def named_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a network by name, independent of compiled modules."""
    return {plain_name(name): p for name, p in uncompiled(network).named_parameters()}


def plain_name(name: str) -> str:
    """Return a dotted name without the parts that ``torch.compile`` inserts."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def eager() -> AbstractContextManager[Any]:
    """Return a context in which compiled code runs uncompiled, so that hooks are called."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def some_of(names: Iterable[str]) -> str:
    """Return a few names for a message."""
    names = sorted(names)
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
