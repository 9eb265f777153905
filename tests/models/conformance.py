"""``make conformance``: what each family was measured to, as docs/conformance.md has it."""

import os
from pathlib import Path

import torch
from models.families import EVERY, load
from models.test_families import inputs
from models.test_family_claims import statistics

from dmin.collect import GradientCollector
from dmin.diffusion.inputs import NoisedBatch
from dmin.doctor.gradients import compare
from dmin.models.oracle import sampling_error
from dmin.sketches import BlockCyclic

PAGE = Path(__file__).parents[2] / "docs/conformance.md"
HEAD = """# Conformance of the families

Measured on tiny checkpoints of every family by `make conformance`, which runs all tests of
models over all families and then writes this page. *Sampler*: how far the real pipeline ends
from x0 with the best network for x0, the autoencoder's numbers set at random (samplers that
stop before all noise is gone, or round their timesteps, end at 1e-3 to 5e-2). *Alone*, *batch*:
the largest error of a parameter's gradient, of all parameters, against autograd, one example at
a time, in float32: of one example alone, and of three together.

| `model=` | parameters | sampler | alone | batch |
|---|---|---|---|---|
"""


def row(name):
    """Measure one family."""
    model = load(name)
    with statistics(model.pipeline.vae):
        error = sampling_error(model)
    x0, noise, t, condition = inputs(model, EVERY[name])
    collector = GradientCollector(model, BlockCyclic(256))
    batch = NoisedBatch(x0, noise, t, condition)
    found = compare(model, collector.attributed, batch, "loss", collector.budget)
    alone, count = max(found.errors().values()), collector.attributed.count
    return f"| `{name}` | {count:,} | {error:.0e} | {alone:.0e} | {found.mixing():.0e} |"


if __name__ == "__main__":
    torch.manual_seed(0)
    rows = [row(name) for name in EVERY]
    PAGE.write_text(HEAD + "\n".join(rows) + "\n")
    print(PAGE.read_text() if os.environ.get("DMIN_SHOW") else PAGE)
