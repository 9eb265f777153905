"""The guard of a collection: each row is the gradient of its own example, or collecting is refused.

Which example each row belongs to is found in the backward pass
(:mod:`dmin.gradients.ownership`). The guard checks the result: rows scale as their losses do, a
pair computed alone has the same row as in a batch, and both equal autograd's.
"""

import time
from collections.abc import Collection, Hashable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from dmin.collect.collector import Collector
from dmin.collect.features import Features
from dmin.collect.peak_memory import PeakMemory
from dmin.diffusion.inputs import NoisedBatch, NoisedExamples
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

# What losses are scaled by: powers of two, which no floating point rounds.
FACTORS = 8
# Scalars of one example's gradient that are compared with autograd's at once.
SCALARS = 1 << 24
# Of a gradient's length. Rows that are scaled scale without rounding, but where a GPU adds up in
# another order each time, or half precision has no small numbers; a pair alone is rounded
# otherwise. Right ones are within 1e-6 in single precision, wrong ones off by 2e-2.
SCALED, EXACT, HALF = 1e-5, 1e-3, 1e-1
# A parameter whose gradient is this small a part of the whole is measured against the whole.
FLOOR = 1e-4


class Guard:
    """Runs passes, and checks the first of each size, shape and set of calls.

    Row b is Σ_c ∂ℓ_c/∂θ over whatever losses reach it. With ℓ_c scaled by 2^{e_c} it must be scaled
    by 2^{e_b}: so it is ∂ℓ_b/∂θ, and no other row has a part of that. What no gradient shows, a
    decision over the whole batch, shows in the first pair computed alone. Of that pair, once, the
    gradients of the parameters are held to autograd's, with all that seem unused; parameters that
    are not had by hooks are from then on had by running the network again.

    Args:
        collector: whose passes are run.
        ownership: what is found out about the rows of the network.
        alone: whether passes of other sizes may be run; not where processes keep in step.

    Attributes:
        seconds: spent on checks so far, beside those that the ownership counts.
    """

    def __init__(self, collector: Collector, ownership: Ownership, alone: bool = True) -> None:
        self.collector = collector
        self.ownership = ownership
        self.alone = alone
        self.seconds = 0.0
        self._seen: set[Hashable] = set()
        self._held: set[Hashable] = set()  # to autograd: networks, by what they leave unused

    def run(self, batch: NoisedBatch, peak: PeakMemory | None = None) -> Features:
        """Return the features of a pass, held to what they should be unless one like it was.

        Args:
            batch: the pairs of the pass.
            peak: is told what the pass takes.

        Raises:
            DminError: a row is not the gradient of its own example; names the parameters.
        """
        if not self.collector.differentiates(batch):
            return self.collector.run(batch, peak=peak)
        state = torch.get_rng_state()
        found = self.collector.run(batch, self.ownership, peak)
        kind: Hashable = self.ownership.latest  # a network may do otherwise at other timesteps
        if self.ownership.routed:  # and with other data: examined each time
            kind = len(batch.t), *batch.x0.shape[1:], self.ownership.called
        if kind in self._seen or (self._seen and not self.alone):
            return found
        start, examined = time.perf_counter(), self.ownership.seconds
        drawn = not torch.equal(state, torch.get_rng_state())  # a pair alone would draw others
        one = batch.rows(slice(0, 1))
        with torch.random.fork_rng():
            if self.alone and not drawn and self._alone_differs(one, found):
                # Whose fault is it: of parameters that hooks do not see right, or of the others?
                if self._unlike_autograd(one):
                    torch.set_rng_state(state)
                    found = self.collector.run(batch, self.ownership, peak)
                if self._alone_differs(one, found):
                    self._require_autograd(one)
                    raise self._mistake(one, found)
            if len(batch.t) > 1:
                torch.set_rng_state(state)
                self._check_scaled(batch, found)
        self._seen.add(kind)
        self.seconds += time.perf_counter() - start - (self.ownership.seconds - examined)
        return found

    def confirm_zeros(self, found: Features, inputs: NoisedExamples, ids: Sequence[str]) -> None:
        """Hold examples without any gradient to autograd's.

        Args:
            found: the features of examples.
            inputs: the examples.
            ids: their names.

        Raises:
            DminError: autograd has a gradient.
        """
        for readout, norms in found.norms.items():
            zero = (norms == 0).flatten(1).all(1)
            if not self.alone or not bool(zero.any()):
                continue
            for row in zero.nonzero()[:, 0].tolist():
                pairs = torch.arange(inputs.points) + row * inputs.points
                for one in inputs.at(pairs).split(1):
                    wrong = self._wrong(one, self.collector.attributed.entries, readout)
                    if wrong:
                        raise DminError(
                            f"example {ids[row]!r} has a gradient of zero at every timestep, but "
                            f"autograd has one, of {some_of(wrong)}: {_UNSEEN}"
                        )

    def _check_scaled(self, batch: NoisedBatch, found: Features) -> None:
        scale = _factors(len(batch.t)).to(batch.x0.device)
        scaled = self.collector.run(batch, self.ownership, scale=scale)
        on_cpu, low = batch.x0.device.type == "cpu", self._low(batch)
        half = any(p.dtype == torch.float16 for p in self.collector.model.network.parameters())
        limit = SCALED if on_cpu and not half else HALF if low else EXACT
        for name, norms in found.norms.items():
            wide = scale.view(-1, *[1] * (norms.ndim - 1))
            same = (scaled.norms[name] / wide, norms), (scaled.values[name], found.values[name])
            if max(_deviation(*pair) for pair in same) > limit:
                raise DminError(
                    "the rows of a pass do not scale as the losses of their examples do: examples "
                    "are mixed, in a way that changes from pass to pass. Set collect.microbatch=1, "
                    "which computes every pair alone."
                )

    def _alone_differs(self, one: NoisedBatch, found: Features) -> bool:
        """Return whether the first pair has another row by itself: by autograd, if that fits."""
        if self.collector.attributed.count <= SCALARS:
            alone = {name: self._by_autograd(one, name) for name in found.norms}
            return self._differs(one, found, alone)
        unused = self.collector.networks.unused_at(float(one.t[0]))
        first, self._held = unused not in self._held, {*self._held, unused}
        return (first and self._unlike_autograd(one)) or self._differs_alone(one, found)

    def _differs_alone(self, one: NoisedBatch, found: Features) -> bool:
        rows = self.collector.run(one, self.ownership)
        alone = {name: (norms, rows.values[name]) for name, norms in rows.norms.items()}
        return self._differs(one, found, alone)

    def _differs(
        self, one: NoisedBatch, found: Features, alone: Mapping[str, tuple[Tensor, Tensor]]
    ) -> bool:
        limit = HALF if self._low(one) else EXACT
        for name, (norms, values) in alone.items():
            same = (norms, found.norms[name][:1]), (values, found.values[name][:1])
            if max(_deviation(*pair) for pair in same) > limit:
                return True
        return False

    def _mistake(self, one: NoisedBatch, found: Features) -> DminError:
        """Say what is wrong with the first pair's row, whose gradient alone is autograd's."""
        if self._differs_alone(one, found):
            return DminError(
                "an example's gradient depends on which others share its pass: the network decides "
                "something over the whole batch. Set collect.microbatch=1, which computes every "
                "pair alone."
            )
        sketch, kernels = type(self.collector.sketch).__name__, self.collector.sketch.kernels
        return DminError(
            f"the rows are not what {sketch} makes of autograd's gradient (collect.kernels="
            f"{kernels}). Set collect.kernels=torch, and report this with `dmin doctor`'s output."
        )

    def _by_autograd(self, one: NoisedBatch, readout: str) -> tuple[Tensor, Tensor]:
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

    def _unlike_autograd(self, one: NoisedBatch) -> bool:
        """Have parameters that hooks do not see right be had otherwise; return if there are any."""
        entries, readout = self.collector.attributed.entries, self.collector.readouts[0]
        wrong = self._wrong(one, _sample(entries), readout)
        if wrong:  # then look at all of them
            wrong |= self._wrong(one, entries, readout)
        self.ownership.by_network |= wrong
        return bool(wrong)

    def _require_autograd(self, one: NoisedBatch) -> None:
        wrong = self._wrong(one, self.collector.attributed.entries, self.collector.readouts[0])
        if wrong:
            raise DminError(
                f"the captured gradient of {len(wrong)} parameter(s) is not autograd's: "
                f"{some_of(wrong)}. {_UNSEEN}"
            )

    def _wrong(self, one: NoisedBatch, entries: Collection[Parameter], readout: str) -> set[str]:
        """Return which gradients of one pair are not autograd's; all that seem unused are tried."""
        limit, wrong = HALF if self._low(one) else EXACT, set()
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

    def _low(self, batch: NoisedBatch) -> bool:
        dtypes = {p.dtype for p in self.collector.model.network.parameters()} | {batch.x0.dtype}
        autocast = torch.is_autocast_enabled(batch.x0.device.type)
        return autocast or any(dtype.itemsize < 4 for dtype in dtypes)


_UNSEEN = (
    "Something computes with them where dmin cannot see it, such as scripted code or a custom "
    "derivative. Load the network without it, or leave them out with collect.params=<regex>."
)


def _factors(count: int) -> Tensor:
    """Return shuffled powers of two, the same for the same count."""
    generator = torch.Generator().manual_seed(count)
    return 2.0 ** (torch.randperm(count, generator=generator) % FACTORS)


def _deviation(found: Tensor, expected: Tensor) -> float:
    """Return the largest distance of a row from the expected one, in units of its length."""
    found, expected = in_double(found.flatten(1)), in_double(expected.flatten(1))
    length = expected.norm(dim=1)
    distance = (found - expected).norm(dim=1)
    return float(torch.where(length > 0, distance / length, distance).max())


def _sample(entries: Collection[Parameter]) -> list[Parameter]:
    """Return parameters of at most so many scalars, evenly spaced; one at least."""
    entries = list(entries)
    step = max(1, -(-sum(prod(e.shape) for e in entries) // SCALARS))
    chosen = sorted(entries[::step], key=lambda e: prod(e.shape))
    return next(in_chunks(chosen, SCALARS))
