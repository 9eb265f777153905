"""The guard of a collection: each row is the gradient of its own example, or collecting is refused.

Which example each row belongs to is found in the backward pass
(:mod:`dmin.gradients.ownership`). The guard checks the result: rows scale as their losses do, in
any order of the pairs, a pair computed alone has the same row as in a batch, and both equal
autograd's.
"""

import time
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from dmin.collect.against_autograd import SCALARS, UNSEEN, AgainstAutograd
from dmin.collect.collector import Collector
from dmin.collect.features import Features
from dmin.collect.network_state import NetworkState
from dmin.collect.peak_memory import PeakMemory
from dmin.diffusion.inputs import NoisedBatch, NoisedExamples
from dmin.gradients.ownership import Ownership
from dmin.gradients.parameters import some_of
from dmin.runtime.errors import DminError
from dmin.runtime.transfer import in_double

# What losses are scaled by: powers of two, which no floating point rounds.
FACTORS = 8
# Of a gradient's length. Rows that are scaled scale without rounding, but where a GPU adds up in
# another order each time, or half precision has no small numbers. At another place of the pass
# they are within 1e-6; what is rounded otherwise is tried at its own place.
SCALED = 1e-5


class Guard:
    """Runs passes, and checks the first of each size, shape and set of calls.

    Row b is Σ_c ∂ℓ_c/∂θ over whatever losses reach it. With ℓ_c scaled by 2^{e_c} it must be scaled
    by 2^{e_b}: so it is ∂ℓ_b/∂θ, and no other row has a part of that. What no gradient shows, what
    is made of a pair by its place or by its neighbours, shows in the same pass if its pairs change
    places; a decision over the whole batch in one pair computed alone. Of that pair, once, the
    gradients of the parameters are held to autograd's, with all that seem unused; parameters that
    are not had by hooks are from then on had by running the network again.

    So a network must do the same each time (:class:`NetworkState`), or is refused.

    Args:
        collector: whose passes are run.
        ownership: known orders of the network's rows.
        alone: whether passes of other sizes may be run; not if processes run in lockstep.

    Attributes:
        seconds: spent on checks so far, besides those counted by the ownership.
    """

    def __init__(self, collector: Collector, ownership: Ownership, alone: bool = True) -> None:
        self.collector = collector
        self.ownership = ownership
        self.alone = alone
        self.seconds = 0.0
        self._autograd = AgainstAutograd(collector, ownership)
        self._state = NetworkState(
            collector.model.network, [entry.name for entry in collector.attributed.entries]
        )
        self._seen: set[Hashable] = set()
        self._held: set[Hashable] = set()  # to autograd: networks, by what they leave unused

    def run(self, batch: NoisedBatch, peak: PeakMemory | None = None) -> Features:
        """Return the features of a pass, checked unless a pass like it was checked before.

        Args:
            batch: the pairs of the pass.
            peak: records the memory of the pass.

        Raises:
            DminError: a row is not the gradient of its own example; the parameters are named.
        """
        if not self.collector.differentiates(batch):
            return self.collector.run(batch, peak=peak)
        self._state.begin()
        found = self.collector.run(batch, self.ownership, peak)
        kind: Hashable = self.ownership.latest  # a network may do otherwise at other timesteps
        if self.ownership.routed:  # and with other data: examined each time
            kind = len(batch.t), *batch.x0.shape[1:], self.ownership.called
        if kind in self._seen or (self._seen and not self.alone):
            return found
        start, examined = time.perf_counter(), self.ownership.seconds
        self._state.require_unchanged()
        if self.alone and self._alone_differs(batch, found):
            # Whose fault is it: of parameters that hooks do not see right, or of the others?
            if self._autograd.mend(_one(batch)):
                found = self.collector.run(batch, self.ownership, peak)
            if self._alone_differs(batch, found):
                self._autograd.require(_one(batch))
                raise self._mistake(batch, found)
        if len(batch.t) > 1:
            self._check_scaled(batch, found)
        self._seen.add(kind)
        self.seconds += time.perf_counter() - start - (self.ownership.seconds - examined)
        return found

    def confirm_zeros(self, found: Features, inputs: NoisedExamples, ids: Sequence[str]) -> None:
        """Compare examples with zero gradients with autograd.

        Args:
            found: the features of examples.
            inputs: the examples.
            ids: their names.

        Raises:
            DminError: autograd's gradient is not zero.
        """
        for readout, norms in found.norms.items():
            zero = (norms == 0).flatten(1).all(1)
            if not self.alone or not bool(zero.any()):
                continue
            for row in zero.nonzero()[:, 0].tolist():
                pairs = torch.arange(inputs.points) + row * inputs.points
                for one in inputs.at(pairs).split(1):
                    wrong = self._autograd.wrong(one, self.collector.attributed.entries, readout)
                    if wrong:
                        raise DminError(
                            f"example {ids[row]!r} has a gradient of zero at every timestep, but "
                            f"autograd has one, of {some_of(wrong)}: {UNSEEN}"
                        )

    def _check_scaled(self, batch: NoisedBatch, found: Features) -> None:
        """Require that rows scale as their losses do, and change places as their pairs do."""
        on_cpu, limit = batch.x0.device.type == "cpu", self._autograd.limit(batch)
        half = any(p.dtype == torch.float16 for p in self.collector.model.network.parameters())
        strict = SCALED if on_cpu and not half else limit
        order = _other_places(len(batch.t)).to(batch.x0.device)
        off = self._scaled_off(batch, found, order)
        if strict < off <= limit:  # kernels may round otherwise at another place
            off = self._scaled_off(batch, found, order.sort().values)
        if off > strict:
            raise self._unlike_itself(batch, found) or DminError(
                "the gradients of a pass do not scale with the losses of their examples, or depend "
                "on the order of the examples: the network mixes examples, or uses their position "
                "in the batch. Set collect.microbatch=1, which computes every pair alone."
            )

    def _scaled_off(self, batch: NoisedBatch, found: Features, order: Tensor) -> float:
        scale = _factors(len(order)).to(order.device)
        scaled = self.collector.run(batch.rows(order), self.ownership, scale=scale)
        off = 0.0
        for name, norms in found.norms.items():
            wide = scale.view(-1, *[1] * (norms.ndim - 1))
            off = max(off, _deviation(scaled.norms[name] / wide, norms[order]))
            off = max(off, _deviation(scaled.values[name], found.values[name][order]))
        return off

    def _unlike_itself(self, batch: NoisedBatch, found: Features) -> DminError | None:
        """Return what is wrong if the same pass has other rows when it is run again."""
        again = self.collector.run(batch, self.ownership)
        limit = self._autograd.limit(batch)
        same = all(_deviation(again.values[n], v) <= limit for n, v in found.values.items())
        return None if same else DminError(_REMEMBERS)

    def _alone_differs(self, batch: NoisedBatch, found: Features) -> bool:
        """Return whether a pair has another row by itself: by autograd, if that fits."""
        one = _one(batch)
        if self.collector.attributed.count <= SCALARS:
            alone = {name: self._autograd.row(one, name) for name in found.norms}
            return self._differs(batch, found, alone)
        unused = self.collector.networks.unused_at(float(one.t[0]))
        first, self._held = unused not in self._held, {*self._held, unused}
        return (first and self._autograd.mend(one)) or self._differs_alone(batch, found)

    def _differs_alone(self, batch: NoisedBatch, found: Features) -> bool:
        rows = self.collector.run(_one(batch), self.ownership)
        alone = {name: (norms, rows.values[name]) for name, norms in rows.norms.items()}
        return self._differs(batch, found, alone)

    def _differs(
        self, batch: NoisedBatch, found: Features, alone: Mapping[str, tuple[Tensor, Tensor]]
    ) -> bool:
        limit, at = self._autograd.limit(batch), _some_place(len(batch.t))
        for name, (norms, values) in alone.items():
            same = (norms, found.norms[name][at]), (values, found.values[name][at])
            if max(_deviation(*pair) for pair in same) > limit:
                return True
        return False

    def _mistake(self, batch: NoisedBatch, found: Features) -> DminError:
        """Say what is wrong with a pair's row, whose gradient alone is autograd's."""
        if error := self._unlike_itself(batch, found):
            return error
        if self._differs_alone(batch, found):
            return DminError(
                "an example's gradient depends on the other examples of its pass, or on its "
                "position there: the network computes something over the whole batch. Set "
                "collect.microbatch=1, which computes every pair alone."
            )
        sketch, kernels = type(self.collector.sketch).__name__, self.collector.sketch.kernels
        return DminError(
            f"the stored rows are not the {sketch} of autograd's gradient "
            f"(collect.kernels={kernels}). Set collect.kernels=torch, and report this with `dmin "
            "doctor`'s output."
        )


_REMEMBERS = (
    "the network gives different gradients when it is run again on the same examples: it keeps a "
    "state between passes, such as a cache of features or a running average. Switch that off."
)


def _some_place(count: int) -> slice:
    """Return where the pair stands that is computed alone: no end, and no multiple of two."""
    at = min((count - 1) // 2 | 1, count - 1)
    return slice(at, at + 1)


def _one(batch: NoisedBatch) -> NoisedBatch:
    return batch.rows(_some_place(len(batch.t)))


def _other_places(count: int) -> Tensor:
    """Return an order in which nothing stays at its place, the same for the same count."""
    cycle = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(1)
    return order


def _factors(count: int) -> Tensor:
    """Return shuffled powers of two, the same for the same count."""
    generator = torch.Generator().manual_seed(count)
    return 2.0 ** (torch.randperm(count, generator=generator) % FACTORS)


def _deviation(found: Tensor, expected: Tensor) -> float:
    """Return the largest distance of a row from the expected one, relative to its norm.

    Infinite if only one of the two is finite; what is finite on neither side is refused later, by
    the example's name.
    """
    found, expected = in_double(found.flatten(1)), in_double(expected.flatten(1))
    length = expected.norm(dim=1)
    distance = (found - expected).norm(dim=1)
    off = torch.where(length > 0, distance / length, distance)
    finite = found.isfinite().all(1), expected.isfinite().all(1)
    off = torch.where(finite[0] & finite[1], off, 0).masked_fill(finite[0] ^ finite[1], torch.inf)
    return float(off.max())
