"""Per-example gradients of each parameter, captured by dmin and computed by plain autograd."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmin.diffusion.inputs import NoisedBatch
from dmin.gradients.capture import Capture
from dmin.gradients.ownership import Ownership
from dmin.gradients.parameters import Parameter, Parameters, in_chunks
from dmin.gradients.recorder import Recorder
from dmin.models.autograd import by_autograd
from dmin.models.base import READOUTS, DiffusionModel
from dmin.models.masked import predict

# Scalars of one example's gradient that are compared at once: a quarter of a GiB in fp32.
AT_ONCE = 1 << 26
# Errors are relative to the layer's gradient, or to this fraction of the whole one if larger.
FLOOR = 1e-4


@dataclass
class Comparison:
    """Norms of gradients and of their differences, ``[pairs]`` for each parameter.

    Attributes:
        norm: of autograd's gradient, one example at a time.
        wrong: of the captured gradient minus autograd's, one example at a time.
        mixed: of the captured gradient in a batch minus the one captured alone.
        path: how each parameter's gradient was computed.
    """

    norm: dict[str, Tensor] = field(default_factory=dict)
    wrong: dict[str, Tensor] = field(default_factory=dict)
    mixed: dict[str, Tensor] = field(default_factory=dict)
    path: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> Tensor:
        """Norm of the whole gradient of each pair, ``[pairs]``."""
        return torch.stack(list(self.norm.values())).square().sum(0).sqrt()

    def errors(self) -> dict[str, float]:
        """Return ``max_i ‖Δ_layer‖ / max(‖g_layer‖, 1e-4 ‖g‖)`` for each parameter."""
        floor = FLOOR * self.whole
        return {
            name: float((wrong / torch.maximum(self.norm[name], floor).clamp_min(1e-300)).max())
            for name, wrong in self.wrong.items()
        }

    def mixing(self) -> float:
        """Return ``max_i ‖Δ‖ / ‖g‖`` between an example in a batch and alone."""
        mixed = torch.stack(list(self.mixed.values())).square().sum(0).sqrt()
        return float((mixed / self.whole.clamp_min(1e-300)).max())


def compare(
    model: DiffusionModel,
    parameters: Parameters,
    inputs: NoisedBatch,
    readout: str,
    budget: int | None = None,
) -> Comparison:
    """Compare captured gradients with autograd's, a chunk of the parameters at a time.

    Args:
        model: on the device of the inputs, in eval mode.
        parameters: the attributed ones.
        inputs: (example, timestep) pairs.
        readout: what is differentiated.
        budget: as for :class:`~dmin.gradients.capture.Capture`.
    """
    found = Comparison()
    count = len(inputs.x0)
    for chunk in in_chunks(parameters.entries, AT_ONCE):
        together, paths = _captured(model, chunk, inputs, readout, budget)
        found.path.update(paths)
        for name, norms in itertools.product(together, (found.norm, found.wrong, found.mixed)):
            norms[name] = torch.zeros(count, dtype=torch.float64)
        for i in range(count):
            one = inputs.rows(slice(i, i + 1))
            alone, _ = _captured(model, chunk, one, readout, budget)
            true = by_autograd(model, [e.name for e in chunk], one, readout)
            for name, gradient in true.items():
                found.norm[name][i] = _norm(gradient)
                found.wrong[name][i] = _norm(alone[name][0] - gradient)
                found.mixed[name][i] = _norm(together[name][i] - alone[name][0])
    return found


def _captured(
    model: DiffusionModel,
    entries: Sequence[Parameter],
    inputs: NoisedBatch,
    readout: str,
    budget: int | None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return captured gradients ``[pairs, *shape]`` and the path of each."""
    recorder, ownership = Recorder(Parameters(tuple(entries))), Ownership()

    def run() -> tuple[dict[str, Tensor], dict[str, str]]:
        hooks = Capture(model.network, recorder, budget, ownership)
        with torch.enable_grad(), hooks as capture:
            return capture.backward(READOUTS[readout](predict(model, inputs))), capture.coverage

    gradients, paths = ownership.settle(run)
    for entry in entries:
        if entry.name not in gradients:  # unused
            gradients[entry.name] = inputs.x0.new_zeros(len(inputs.x0), *entry.shape).float()
    return gradients, paths


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64 if x.is_cpu else torch.float32))
