"""The checks, each with what to do when it fails."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dmin.collect import GradientCollector
from dmin.diffusion.inputs import NoisedBatch
from dmin.doctor.diagnosis import Check
from dmin.doctor.gradients import Comparison, compare
from dmin.gradients.examination import Coupled
from dmin.gradients.parameters import Parameter
from dmin.models.base import READOUTS, Condition
from dmin.models.latent import LatentDiffusion
from dmin.models.masked import predict
from dmin.models.oracle import sampling_error
from dmin.models.text_encoders import WithTextEncoders
from dmin.runtime.errors import DminError
from dmin.runtime.transfer import in_double
from dmin.sketches import Sketch

# Largest relative errors due to rounding, by the dtype that the network computes in.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Largest mean error of a sketch, in standard errors.
SKETCH_LIMIT = 6.0
# Relative; some samplers end before all noise is removed, or round their timesteps.
SAMPLER_LIMIT = 0.1
# Factor on LIMITS: other batch sizes use other kernels; small losses magnify their rounding.
BATCH_ROUNDING = 10.0
SHAPES, SCALARS = 48, 1 << 24  # most layer shapes that are sketched, and random scalars for each


def weights(network: nn.Module) -> Check:
    """Check that no weight is NaN or infinite."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    bad = [n for n, p in tensors if p.is_floating_point() and not torch.isfinite(p).all()]
    remedy = "Load another checkpoint: this one is damaged. Nothing else was checked."
    return _none("weights are finite", "NaN or infinite", bad, remedy)


def mode(network: nn.Module) -> Check:
    """Check whether the network is in eval mode, as in collecting."""
    return Check(
        "the network is in eval mode",
        not network.training,
        detail="It is in train mode." if network.training else "",
        remedy="Collecting and the following checks switch it to eval mode; call .eval() where "
        "you use the model yourself.",
        required=False,
    )


def encoders(first: tuple[Tensor, Condition], second: tuple[Tensor, Condition]) -> Check:
    """Compare two encodings of the same examples."""
    pairs = [(first[0], second[0]), *((v, second[1][name]) for name, v in first[1].items())]
    off = max(float((in_double(a) - in_double(b)).abs().max()) for a, b in pairs)
    return Check.within(
        "encoding is deterministic",
        off,
        1e-6,
        "Largest difference between encoding the same examples twice.",
        "Put the encoders in eval mode, and use the mode of the VAE's posterior or a seeded draw: "
        "otherwise equal images of queries and training examples get different encodings.",
    )


def in_each_pass(network: nn.Module) -> list[Check]:
    """Name the trained text encoders, which run in every pass, and their cost."""
    if not isinstance(network, WithTextEncoders):
        return []
    sizes = {name: sum(p.numel() for p in e.parameters()) for name, e in network.encoders.items()}
    whole = sum(p.numel() for p in network.network.parameters())
    told = " and ".join(f"{name} ({size:,} weights)" for name, size in sizes.items())
    detail = (
        f"{told} encode the captions once for each pair of example and timestep, forward and "
        f"backward, in addition to the network's {whole:,} weights; the time below includes this. "
        f"model.text_encoders=frozen encodes once per example, without their gradients."
    )
    return [Check("text encoders are attributed", True, detail=detail)]


def repeatable(collector: GradientCollector, inputs: NoisedBatch) -> Check:
    """Compare two passes over the same input."""
    readout = READOUTS[collector.readouts[0]]
    with torch.no_grad():
        first, second = (readout(predict(collector.model, inputs)) for _ in range(2))
    off = float(((first - second).abs() / first.abs().clamp_min(1e-12)).max())
    return Check.within(
        "the network is deterministic",
        off,
        _limit(collector),
        "Largest relative difference of the loss between two passes over the same input.",
        "The network uses random numbers in eval mode. Switch its dropout off.",
    )


def sampler(model: Any) -> list[Check]:
    """Check the family's process and latents with the checkpoint's sampler (`sampling_error`)."""
    if not isinstance(model, LatentDiffusion) or getattr(model.process, "target", "") == "noise":
        return []
    return [
        Check.within(
            "its own sampler agrees with the loss",
            sampling_error(model),
            SAMPLER_LIMIT,
            "Relative error of the pipeline's result if the network is optimal for one image.",
            "The sign, time unit, process or latent scale differ from what model=... assumes. Put "
            "the scheduler of its training into the checkpoint, or choose its family.",
        )
    ]


def gradients(
    collector: GradientCollector, inputs: NoisedBatch
) -> tuple[Comparison | None, list[Check]]:
    """Compare captured gradients with autograd's, one example at a time and in a batch."""
    limit, readout = _limit(collector), collector.readouts[0]
    name = "gradients equal autograd's"
    try:
        found = compare(collector.model, collector.attributed, inputs, readout, collector.budget)
    except Coupled as error:
        who = _batch_norms(collector.model.network)
        remedy = f"A layer combines examples{who}. Set collect.microbatch=1."
        return None, [
            Check("examples do not mix in a batch", False, detail=str(error), remedy=remedy)
        ]
    except DminError as error:
        return None, [Check(name, False, detail=str(error))]
    errors = found.errors()
    worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    lost = [n for n, norm in found.norm.items() if not torch.isfinite(norm).all()]
    zero = [n for n, norm in found.norm.items() if (norm == 0).all()]
    return found, [
        Check.within(
            name,
            errors[worst],
            limit,
            f"Largest relative error, at {worst}, in {_dtype(collector)}, one example at a time.",
            f"Leave that layer out with collect.params=<regex>, and report it: gradients of "
            f"{type(layer_of(collector, worst)).__name__} should be exact.",
        ),
        Check.within(
            "examples do not mix in a batch",
            found.mixing(),
            BATCH_ROUNDING * limit,
            "Largest relative difference between an example's gradient alone and in a batch.",
            f"A layer combines examples{_batch_norms(collector.model.network)}. Make it use "
            f"fixed statistics, or set collect.microbatch=1.",
        ),
        _none(
            "gradients are finite",
            "NaN or infinite",
            lost,
            "Try trainer.precision=32-true, and examine these layers.",
        ),
        _none(
            "every parameter has a gradient",
            "Zero for all examples",
            zero,
            "They add nothing to any score. This is normal for some: the bias of attention keys, "
            "an adapter's factor whose partner is still zero, the last block's text branch.",
            required=False,
        ),
    ]


def sketch(sketch: Sketch, device: torch.device) -> Check:
    """Compare ``⟨S g, S h⟩`` with ``⟨g, h⟩`` for random vectors, for each shape of layer.

    The value is the mean error over n pairs divided by the standard error that the sketch's stated
    variance implies: ``√((1 + ρ²)/(k n))`` for most families (Li & Li, arXiv 2302.03505).
    """
    shapes: dict[tuple[int, ...], Parameter] = {}
    for entry in sketch.parameters.entries:
        shapes.setdefault(entry.shape, entry)
    largest = sorted(shapes.values(), key=lambda e: -prod(e.shape))[:SHAPES]
    scores = {e.name: _bias(sketch, e, device) for e in largest}
    worst = max(scores, key=lambda name: scores[name])
    return Check.within(
        "sketches keep inner products",
        scores[worst],
        SKETCH_LIMIT,
        f"Largest bias over {len(scores)} layer shapes, at {worst}, in standard errors.",
        "The sketch weights some layers more than others. Choose another one, and report this.",
    )


def _bias(sketch: Sketch, entry: Parameter, device: torch.device) -> float:
    count = max(2, min(16, SCALARS // max(1, prod(entry.shape))))
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(count, *entry.shape, generator=generator).to(device)
    h = g + torch.randn(count, *entry.shape, generator=generator).to(device)
    sketched = [in_double(sketch.of({entry.name: x}).flatten(1)) for x in (g, h)]
    variance = in_double(sketch.variance(entry.name, g, h))
    g, h = in_double(g.flatten(1)), in_double(h.flatten(1))
    scale = g.norm(dim=1) * h.norm(dim=1)
    true = (g * h).sum(1) / scale
    error = (sketched[0] * sketched[1]).sum(1) / scale - true
    deviation = (variance / scale.square()).sum().sqrt() / count
    return float(error.mean().abs() / (deviation + 1e-6))  # a sketch's variance may be zero


def layer_of(collector: GradientCollector, parameter: str) -> nn.Module:
    """Return the layer that owns a parameter."""
    return collector.model.network.get_submodule(parameter.rpartition(".")[0])


def _dtype(collector: GradientCollector) -> torch.dtype:
    """Return the dtype that the network computes in: that of autocast, or of its weights."""
    first = next(collector.model.network.parameters())
    kind = first.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else first.dtype


def _limit(collector: GradientCollector) -> float:
    return LIMITS.get(_dtype(collector), max(LIMITS.values()))


def _none(name: str, what: str, found: list[str], remedy: str, required: bool = True) -> Check:
    """Return the check that a list of findings is empty."""
    detail = f"{what}: {_some(found)}." if found else ""
    return Check(name, not found, float(len(found)), 0, detail, remedy, required)


def _batch_norms(network: nn.Module) -> str:
    found = [
        n for n, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    return f", such as the batch normalisation {_some(found)}" if found else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
