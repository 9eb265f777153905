"""Gradients of a layer whose rows are not ordered example by example."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dmin.gradients.calls import Call
from dmin.gradients.factors import GradientFactors


@dataclass
class Arrived:
    """One call's input and output gradient, kept until the last call of its layer has arrived.

    Attributes:
        call: the call of a layer with a closed form.
        input: the layer's input.
        gradient: the gradient of its output.
        owners: ``[rows]``, the example of each row; negative if it has no gradient.
    """

    call: Call
    input: Tensor
    gradient: Tensor
    owners: Tensor

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Input and output gradient with one leading axis."""
        axes = len(self.call.rows(0))
        return self.input.flatten(0, axes - 1), self.gradient.flatten(0, axes - 1)


Ordered = dict[nn.Module, list[dict[str, GradientFactors]]]
"""Factors sorted by example: for each layer a list over shapes of rows, by local name."""


def factors_of(
    name: str, parts: Sequence[GradientFactors | Arrived], batch: int, ordered: Ordered
) -> list[GradientFactors]:
    """Return the factors of one parameter, after sorting rows by example where necessary.

    Args:
        name: name of the parameter.
        parts: factors, or input and output gradient, of each of its calls.
        batch: number of examples.
        ordered: factors already sorted for other parameters of the layer; new ones are added.
    """
    waiting: dict[nn.Module, list[Arrived]] = defaultdict(list)
    found: list[GradientFactors] = []
    for part in parts:
        if isinstance(part, Arrived):
            waiting[part.call.module].append(part)
        else:
            found.append(part)
    for module, calls in waiting.items():
        if module not in ordered:
            ordered[module] = _put_in_order(calls, batch)
        local = next(local for local, own in calls[0].call.own.items() if own == name)
        found += [factors[local] for factors in ordered[module]]
    return found


def _put_in_order(arrived: Sequence[Arrived], batch: int) -> list[dict[str, GradientFactors]]:
    """Return the factors of a layer's parameters, with rows sorted by example.

    Calls with the same shape of rows are joined, because each call has the rows of a single example
    if a network takes a list with one tensor per example.

    Args:
        arrived: the calls of one layer.
        batch: number of examples.

    Returns:
        Factors by local name, for each shape of rows.
    """
    alike: dict[tuple, list[Arrived]] = defaultdict(list)
    for each in arrived:
        a, d = each.rows
        alike[a.shape[1:], d.shape[1:]].append(each)
    found = []
    for group in alike.values():
        inputs, gradients = zip(*(each.rows for each in group), strict=True)
        owners = torch.cat([each.owners for each in group])
        index = _index(owners, batch).to(gradients[0].device)
        call = group[0].call
        found.append(call.how(call.module, _taken(inputs, index), _taken(gradients, index), batch))
    return found


def _index(owners: Tensor, batch: int) -> Tensor:
    """Return the rows of each example, padded with −1 to equal numbers, ``[batch · most]``."""
    lists = [(owners == b).nonzero()[:, 0] for b in range(batch)]
    return pad_sequence(lists, batch_first=True, padding_value=-1).flatten()


def _taken(tensors: Sequence[Tensor], index: Tensor) -> Tensor:
    """Return rows by index; zeros for −1."""
    rows = torch.cat(tuple(tensors)) if len(tensors) > 1 else tensors[0]
    taken = rows[index.clamp(min=0)]
    absent = index < 0
    return taken.masked_fill(absent.view(-1, *[1] * (taken.ndim - 1)), 0)
