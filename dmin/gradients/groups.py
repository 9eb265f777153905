"""Groups of parameters that are sketched separately, so that a score can be split between them."""

import re
from collections.abc import Callable, Mapping
from typing import Literal

from dmin.gradients.parameters import Parameters
from dmin.runtime.errors import DminError

Grouping = Literal["block", "layer"] | Mapping[str, str]


def grouped(parameters: Parameters, groups: Grouping | None) -> Parameters:
    """Return the parameters with the group in which each is sketched.

    Args:
        parameters: parameters of one model; their groups are replaced.
        groups: None: a single group. ``block``: one group for each top-level block of the network
            (``down_blocks.0``, ``transformer_blocks.11``, ``conv_in``). ``layer``: one for each
            module with parameters. Or a mapping of group names to regular expressions, which are
            searched for in the dotted names of parameters; the first that matches is used.

    Raises:
        DminError: the value is none of these, an expression is invalid or matches nothing, or a
            parameter matches none.
    """
    if groups is None:
        name_of: Callable[[str], str] = lambda name: "model"  # noqa: E731
        names = ["model"]
    elif isinstance(groups, Mapping):
        name_of = _by_expression(parameters, groups)
        names = list(groups)
    elif groups in ("block", "layer"):
        name_of = _block if groups == "block" else _layer
        names = list(dict.fromkeys(name_of(entry.name) for entry in parameters.entries))
    else:
        raise DminError(
            f"collect.groups={groups!r}: allowed are null, block, layer, or names with regular "
            f"expressions, such as {{attention: attn, rest: .}}."
        )
    place = {name: number for number, name in enumerate(names)}
    entries = [entry._replace(group=place[name_of(entry.name)]) for entry in parameters.entries]
    return Parameters(tuple(entries), tuple(names))


def _block(name: str) -> str:
    """Return the first part of a dotted name, with the number that follows it, if any."""
    parts = name.split(".")[:-1]
    if not parts:
        return name
    return ".".join(parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1])


def _layer(name: str) -> str:
    """Return the module of a parameter; a parameter of the network itself is its own group."""
    return name.rpartition(".")[0] or name


def _by_expression(parameters: Parameters, groups: Mapping[str, str]) -> Callable[[str], str]:
    if not groups:
        raise DminError("collect.groups={}: give one or more groups, or set it to null.")
    patterns = {}
    for group, expression in groups.items():
        try:
            patterns[group] = re.compile(expression)
        except (re.error, TypeError) as error:
            raise DminError(
                f"collect.groups.{group}={expression!r} is not a regular expression: {error}."
            ) from error
    found = {
        entry.name: next((group for group, p in patterns.items() if p.search(entry.name)), None)
        for entry in parameters.entries
    }
    left = [name for name, group in found.items() if group is None]
    if left:
        raise DminError(
            f"collect.groups: {len(left)} parameter(s) match none of {', '.join(patterns)}: "
            f"{', '.join(left[:5])}{' …' if len(left) > 5 else ''}. Add a last group for the rest "
            f"(rest: .), or leave them out with collect.params."
        )
    empty = [group for group in patterns if group not in found.values()]
    if empty:
        raise DminError(
            f"collect.groups.{empty[0]}={groups[empty[0]]!r}: no parameter is left for this group "
            f"after the groups before it. Names look like {', '.join(list(found)[:3])}."
        )
    return lambda name: str(found[name])
