"""The guard of a collection: each row is the gradient of its own example, or it is refused.

A network may order a layer's rows otherwise than example after example, let examples see each
other, or use a parameter where no hook sees it. Each is found by what it does to gradients.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from math import prod

import torch
from torch import Tensor

from dmin.collect.collector import Collector
from dmin.collect.features import Features
from dmin.diffusion.inputs import NoisedBatch
from dmin.gradients.capture import Capture
from dmin.gradients.parameters import Parameter, some_of
from dmin.gradients.recorder import Recorder
from dmin.models.autograd import by_autograd
from dmin.models.base import READOUTS
from dmin.runtime.errors import DminError

# What losses are scaled by: powers of two, which no floating point rounds.
FACTORS = 8
# Scalars of one example's gradient that are compared with autograd's.
SCALARS = 1 << 24
# Of a gradient's length. Right ones are within 1e-6 in single precision, wrong ones off by 2e-2.
EXACT, HALF = 1e-3, 1e-1
# A parameter whose gradient is this small a part of the whole is measured against the whole.
FLOOR = 1e-4


class Guard:
    """Checks the first pass of each size and shape.

    Row b is Σ_c ∂ℓ_c/∂θ over whatever losses reach it. With ℓ_c scaled by 2^{e_c} it must be scaled
    by 2^{e_b}: so it is ∂ℓ_b/∂θ, and no other row has a part of that. What no gradient shows, a
    decision over the whole batch, shows in the first pair computed alone. Of that pair, once, the
    gradients of the parameters are held to autograd's, with all that seem unused.

    Args:
        collector: whose passes are checked.

    Attributes:
        seconds: spent so far.
    """

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self.seconds = 0.0
        self._seen: set[tuple[int, ...]] = set()

    def check(self, batch: NoisedBatch, found: Features, state: Tensor, alone: bool = True) -> None:
        """Hold the rows of a pass to what they should be, unless one like it was checked.

        Args:
            batch: the pairs of the pass.
            found: what it gave.
            state: of the CPU's random numbers before it.
            alone: whether passes of other sizes may be run; not where processes keep in step.

        Raises:
            DminError: a row is not the gradient of its own example; names the parameters.
        """
        kind = (len(batch.t), *batch.x0.shape[1:])
        if kind in self._seen or (self._seen and not alone):
            return
        start, first = time.perf_counter(), not self._seen
        self._seen.add(kind)
        drawn = not torch.equal(state, torch.get_rng_state())  # a pair alone would draw others
        with torch.random.fork_rng():
            torch.set_rng_state(state)
            if len(batch.t) > 1:
                self._check_scaled(batch, found)
            if alone and not drawn:
                one = batch.rows(slice(0, 1))
                self._check_alone(one, found)
                if first:
                    self._check_by_autograd(one)
        self.seconds += time.perf_counter() - start

    def _check_scaled(self, batch: NoisedBatch, found: Features) -> None:
        scale = _factors(len(batch.t)).to(batch.x0.device)
        scaled = self.collector.run(batch, scale=scale)
        for name, norms in found.norms.items():
            wide = scale.view(-1, *[1] * (norms.ndim - 1))
            same = (scaled.norms[name] / wide, norms), (scaled.values[name], found.values[name])
            if max(_deviation(*pair) for pair in same) > self._tolerance(batch):
                raise self._mixed(batch, scale)

    def _check_alone(self, one: NoisedBatch, found: Features) -> None:
        alone = self.collector.run(one)
        for name, norms in found.norms.items():
            same = (alone.norms[name], norms[:1]), (alone.values[name], found.values[name][:1])
            if max(_deviation(*pair) for pair in same) > self._tolerance(one):
                raise DminError(
                    "an example's gradient depends on which others share its pass: the network "
                    "decides something over the whole batch. Set collect.microbatch=1, which "
                    "computes every pair alone."
                )

    def _check_by_autograd(self, one: NoisedBatch) -> None:
        """Hold captured gradients of one pair to autograd's, some of them if there are many."""
        collector, network = self.collector, self.collector.model.network
        sample = _sample(collector.attributed.entries)
        recorder = Recorder(collector.attributed, sample)
        readout = READOUTS[collector.readouts[0]]
        with torch.enable_grad(), Capture(network, recorder, collector.budget) as capture:
            captured = capture.backward(readout(collector.model.predict(*one)))
        unused = [name for name in collector.attributed.by_name if name not in captured]
        true = by_autograd(collector.model, {*sample, *unused}, one, collector.readouts[0])
        whole = torch.stack([g.double().norm() for g in true.values()] or [torch.zeros(())]).norm()
        wrong = []
        for name, gradient in true.items():
            ours = captured[name][0] if name in captured else torch.zeros_like(gradient)
            length = max(float(gradient.double().norm()), FLOOR * float(whole), 1e-300)
            if float((ours.double() - gradient.double()).norm()) / length > self._tolerance(one):
                wrong.append(name)
        if wrong:
            raise DminError(
                f"the captured gradient of {len(wrong)} parameter(s) is not autograd's: "
                f"{some_of(wrong)}. Something computes with them where dmin cannot see it: "
                f"compiled code, a hook or forward of one's own, an assignment into a tensor. Load "
                f"the network without it, or leave them out with collect.params=<regex>."
            )

    def _mixed(self, batch: NoisedBatch, scale: Tensor) -> DminError:
        """Say which parameters' gradients are mixed."""
        collector, network = self.collector, self.collector.model.network
        lengths: list[dict[str, Tensor]] = []
        for factors in (torch.ones_like(scale), scale):
            lengths.append({})
            for entry in collector.attributed.entries:
                recorder = Recorder(collector.attributed, [entry.name])
                with torch.enable_grad(), Capture(network, recorder, collector.budget) as capture:
                    value = READOUTS[collector.readouts[0]](collector.model.predict(*batch))
                    gradient = capture.backward(value * factors).get(entry.name)
                if gradient is not None:
                    lengths[-1][entry.name] = (gradient.flatten(1).norm(dim=1) / factors)[:, None]
        plain, scaled = lengths
        limit = self._tolerance(batch)
        names = [n for n in plain if n in scaled and _deviation(scaled[n], plain[n]) > limit]
        return DminError(
            f"gradients of {len(names)} parameter(s) mix the examples of a pass: {some_of(names)}. "
            f"Their layers do not take rows example after example, or examples see each other "
            f"(batch statistics). Set collect.microbatch=1, which computes every pair alone."
        )

    def _tolerance(self, batch: NoisedBatch) -> float:
        dtypes = {p.dtype for p in self.collector.model.network.parameters()} | {batch.x0.dtype}
        low = torch.is_autocast_enabled(batch.x0.device.type) or any(d.itemsize < 4 for d in dtypes)
        return HALF if low else EXACT


def _factors(count: int) -> Tensor:
    """Return shuffled powers of two, the same for the same count."""
    generator = torch.Generator().manual_seed(count)
    return 2.0 ** (torch.randperm(count, generator=generator) % FACTORS)


def _deviation(found: Tensor, expected: Tensor) -> float:
    """Return the largest distance of a row from the expected one, in units of its length."""
    found, expected = found.flatten(1).double(), expected.flatten(1).double()
    length = expected.norm(dim=1)
    distance = (found - expected).norm(dim=1)
    return float(torch.where(length > 0, distance / length, distance).max())


def _sample(entries: Collection[Parameter]) -> list[str]:
    """Return names of parameters of at most so many scalars, evenly spaced; one at least."""
    entries = list(entries)
    step = max(1, -(-sum(prod(e.shape) for e in entries) // SCALARS))
    chosen: list[str] = []
    scalars = 0
    for entry in sorted(entries[::step], key=lambda e: prod(e.shape)):
        scalars += prod(entry.shape)
        if chosen and scalars > SCALARS:
            break
        chosen.append(entry.name)
    return chosen
