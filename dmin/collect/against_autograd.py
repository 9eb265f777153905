"""One pair's gradients as they are captured, held to those of plain autograd."""

from collections.abc import Collection
from math import prod

import torch
from torch import Tensor

from dmin.collect.collector import Collector
from dmin.diffusion.inputs import NoisedBatch
from dmin.gradients.capture import Capture
from dmin.gradients.factors import wide_dtype
from dmin.gradients.ownership import Ownership
from dmin.gradients.parameters import Parameter, in_chunks, some_of
from dmin.gradients.recorder import Recorder
from dmin.models.autograd import by_autograd
from dmin.models.base import READOUTS
from dmin.models.masked import predict
from dmin.runtime.errors import DminError
from dmin.runtime.transfer import in_double

# Scalars of one example's gradient that are compared with autograd's at once.
SCALARS = 1 << 24
# Of a gradient's length. Right ones are within 1e-6 in single precision, wrong ones off by 2e-2.
EXACT, HALF = 1e-3, 1e-1
# A parameter whose gradient is this small a part of the whole is measured against the whole.
FLOOR = 1e-4


class AgainstAutograd:
    """Compares the captured gradients of a pair with autograd's.

    Args:
        collector: whose gradients are captured.
        ownership: what is found out about the rows of the network.
    """

    def __init__(self, collector: Collector, ownership: Ownership) -> None:
        self.collector = collector
        self.ownership = ownership

    def limit(self, batch: NoisedBatch) -> float:
        """Return how far gradients may be off for rounding, of their length."""
        dtypes = {p.dtype for p in self.collector.model.network.parameters()} | {batch.x0.dtype}
        autocast = torch.is_autocast_enabled(batch.x0.device.type)
        return HALF if autocast or any(dtype.itemsize < 4 for dtype in dtypes) else EXACT

    def row(self, one: NoisedBatch, readout: str) -> tuple[Tensor, Tensor]:
        """Return norms ``[1, groups]`` and values ``[1, groups, k]`` of a row by autograd."""
        attributed, sketch = self.collector.attributed, self.collector.sketch
        true = by_autograd(self.collector.model, attributed.by_name, one, readout)
        wide = {name: gradient[None].to(wide_dtype(gradient)) for name, gradient in true.items()}
        values = sketch.of(wide)
        squares = values.square().sum(-1)  # of a sketch whose norms are those of its rows
        if sketch.norm_kind == "exact":
            squares = torch.zeros_like(squares)
            for entry in attributed.entries:
                squares[:, entry.group] += wide[entry.name].square().sum().to(squares)
        norm = squares.sum(1).sqrt()
        return squares.sqrt(), values / torch.where(norm > 0, norm, 1)[:, None, None]

    def mend(self, one: NoisedBatch) -> bool:
        """Have parameters that hooks do not see right be had otherwise; return if there are any."""
        entries, readout = self.collector.attributed.entries, self.collector.readouts[0]
        wrong = self.wrong(one, _sample(entries), readout)
        if wrong:  # then look at all of them
            wrong |= self.wrong(one, entries, readout)
        self.ownership.by_network |= wrong
        return bool(wrong)

    def require(self, one: NoisedBatch) -> None:
        """Refuse parameters whose captured gradient is not autograd's."""
        wrong = self.wrong(one, self.collector.attributed.entries, self.collector.readouts[0])
        if wrong:
            raise DminError(
                f"the captured gradient of {len(wrong)} parameter(s) is not autograd's: "
                f"{some_of(wrong)}. {UNSEEN}"
            )

    def wrong(self, one: NoisedBatch, entries: Collection[Parameter], readout: str) -> set[str]:
        """Return which gradients of one pair are not autograd's; all that seem unused are tried."""
        limit, wrong = self.limit(one), set()
        declared = self.collector.networks.unused_at(float(one.t[0]))
        entries = [entry for entry in entries if not entry.name.startswith(declared)]
        for chunk in in_chunks(entries, SCALARS):
            names = [entry.name for entry in chunk]
            captured = self._captured(one, names, readout)
            known = (name for name in self.collector.attributed.by_name if name not in captured)
            unused = [name for name in known if not name.startswith(declared)]
            true = by_autograd(self.collector.model, {*names, *unused}, one, readout)
            norms = [in_double(g).norm() for g in true.values()]
            whole = float(torch.stack(norms).norm()) if norms else 0.0
            for name, gradient in true.items():
                ours = captured[name][0] if name in captured else torch.zeros_like(gradient)
                length = max(float(in_double(gradient).norm()), FLOOR * whole, 1e-300)
                if float((in_double(ours) - in_double(gradient)).norm()) / length > limit:
                    wrong.add(name)
        return wrong

    def _captured(
        self, one: NoisedBatch, names: Collection[str], readout: str
    ) -> dict[str, Tensor]:
        collector = self.collector
        recorder = Recorder(collector.attributed, names)
        hooks = Capture(collector.model.network, recorder, collector.budget, self.ownership)
        with torch.enable_grad(), hooks as capture:
            return capture.backward(READOUTS[readout](predict(collector.model, one)))


UNSEEN = (
    "Something computes with them where dmin cannot see it, such as scripted code or a custom "
    "derivative. Load the network without it, or leave them out with collect.params=<regex>."
)


def _sample(entries: Collection[Parameter]) -> list[Parameter]:
    """Return parameters of at most so many scalars, evenly spaced; one at least."""
    entries = list(entries)
    step = max(1, -(-sum(prod(e.shape) for e in entries) // SCALARS))
    chosen = sorted(entries[::step], key=lambda e: prod(e.shape))
    return next(in_chunks(chosen, SCALARS))
