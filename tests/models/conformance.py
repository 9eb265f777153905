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
models over all families and then writes this page. *Sampler*: the distance from x0 at which
the real pipeline ends, with the optimal network for x0 and random autoencoder statistics (samplers
that stop before all noise is removed, or round their timesteps, end at 1e-3 to 5e-2). *Alone*,
*batch*: the largest error of a gradient over all parameters, against autograd one example at a
time, in float32: for one example alone, and for three in a batch.

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
