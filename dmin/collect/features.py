"""Features of examples on their way from the network to the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmin.runtime.errors import DminError
from dmin.runtime.transfer import to_host
from dmin.store import Rows

Block = Sequence[Mapping[str, Any]]
"""The examples of a block: a batch for each shape, with the examples' ``position``s."""


class Features(NamedTuple):
    """The features of a block of examples; axes as in the store."""

    values: dict[str, Tensor]  # readout -> [rows, draw, timestep, group, dim], unit gradients
    norms: dict[str, Tensor]  # readout -> [rows, draw, timestep, group]
    losses: Tensor  # [rows, draw, timestep]

    def first(self, rows: int) -> Features:
        """Return the features of the first rows."""
        values = {name: value[:rows] for name, value in self.values.items()}
        norms = {name: norm[:rows] for name, norm in self.norms.items()}
        return Features(values, norms, self.losses[:rows])

    def to_host(self) -> Callable[[], Features]:
        """Start copying the features to the host; return a function that waits for them."""
        names = list(self.values)
        wait = to_host([*self.values.values(), *self.norms.values(), self.losses])

        def arrived() -> Features:
            *found, losses = wait()
            values = dict(zip(names, found[: len(names)], strict=True))
            return Features(values, dict(zip(names, found[len(names) :], strict=True)), losses)

        return arrived

    def check_finite(self, ids: Sequence[str], timesteps: Sequence[float]) -> None:
        """Refuse gradients that are NaN or infinite.

        Args:
            ids: of the rows' examples.
            timesteps: of the timesteps' axis.

        Raises:
            DminError: there is one; example and timestep are named.
        """
        for readout, norms in self.norms.items():
            bad = (~torch.isfinite(norms)).nonzero()
            if not len(bad):
                continue
            row, _, step, _ = bad[0].tolist()
            raise DminError(
                f"the gradient of {readout} for example {ids[row]!r} at timestep "
                f"{timesteps[step]:g} is NaN or infinite ({len(bad)} such gradients in this "
                "block). Look at that image and at the checkpoint's weights (`dmin doctor` does); "
                "in low precision, try trainer.precision=32-true. Finished blocks are kept."
            )

    @classmethod
    def joined(
        cls, parts: Sequence[Features], shape: tuple[int, ...], order: Tensor | None = None
    ) -> Features:
        """Join the features of several passes, with the axis of pairs split again.

        Args:
            parts: with a leading axis of pairs.
            shape: of that axis, ``[rows, draw, timestep]``.
            order: index of each pair among the parts; None if they are in order.
        """

        def one(tensors: list[Tensor]) -> Tensor:
            found = torch.cat(tensors)
            return (found if order is None else found[order.to(found.device)]).unflatten(0, shape)

        def whole(each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {n: one([of[n] for of in each]) for n in each[0]}

        losses = one([part.losses for part in parts])
        values, norms = [part.values for part in parts], [part.norms for part in parts]
        return cls(whole(values), whole(norms), losses)


def rows_of(
    block: Block, parts: Sequence[Features], timesteps: Sequence[float]
) -> Callable[[], Rows]:
    """Start copying the features of a block to the host.

    Args:
        block: its examples.
        parts: their features, one part for each batch of the block.
        timesteps: of the timesteps' axis.

    Returns:
        A function that waits for the copies and returns the rows in the order of the examples'
        positions, to be called in any thread. It raises a DminError if a gradient is NaN.
    """
    order = torch.tensor([place for batch in block for place in batch["position"]]).argsort()
    facts = [fact for b in block for fact in zip(b["id"], b["metadata"], strict=True)]
    ids, metadata = zip(*(facts[i] for i in order.tolist()), strict=True)
    arriving = [part.to_host() for part in parts]

    def joined(tensors: Sequence[Tensor]) -> Any:
        return torch.cat(list(tensors))[order].numpy()

    def rows() -> Rows:
        found = [wait() for wait in arriving]
        for part, batch in zip(found, block, strict=True):
            part.check_finite(batch["id"], timesteps)
        values = {name: joined([part.values[name] for part in found]) for name in found[0].values}
        norms = {name: joined([part.norms[name] for part in found]) for name in found[0].norms}
        losses = joined([part.losses for part in found])
        return Rows(list(ids), list(metadata), values, norms, losses)

    return rows
