"""Groups of parameters that are sketched separately, so that a score can be split between them."""

import re
from collections.abc import Callable, Mapping
from typing import Literal

from dmin.gradients.parameters import Parameters
from dmin.runtime.errors import DminError

Grouping = Literal["block", "layer"] | Mapping[str, str]


def grouped(parameters: Parameters, groups: Grouping | None) -> Parameters:
    """Return parameters with the group that each is sketched in.

    Args:
        parameters: of one model; any groups they have are replaced.
        groups: None for one group of all; ``block`` for one for each block at the top of the
            network (``down_blocks.0``, ``transformer_blocks.11``, ``conv_in``); ``layer`` for one
            for each module with parameters; or names with regular expressions searched for in the
            dotted names of parameters, of which the first that matches decides.

    Raises:
        DminError: another word, an expression that is invalid or matches nothing, or a parameter
            that none matches.
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
    """Return the top of a dotted name, with its number if it has one."""
    parts = name.split(".")[:-1]
    if not parts:
        return name
    return ".".join(parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1])


def _layer(name: str) -> str:
    """Return the module that a parameter belongs to; bare parameters are by themselves."""
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
