"""A small store whose every value follows from its dataset position."""

import multiprocessing
from collections.abc import Callable

import numpy as np
import pytest

from dmin.store import Layout, Manifest, Rows


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    """Return a function that makes a manifest; arguments replace its defaults."""

    def make(**changes) -> Manifest:
        layout = dict(
            readouts=("loss", "square"),
            draws=2,
            timesteps=(10.0, 500.0, 990.5),
            groups=("down", "up"),
            dim=8,
            dtype="float32",
        )
        layout |= {name: changes.pop(name) for name in list(changes) if name in layout}
        fields = dict(
            features={"weights": "ab12", "sketch": {"kind": "oporp", "dim": 8}},
            dataset={"name": "digits", "content": "cd34"},
            num_examples=30,
            block_size=4,
        )
        return Manifest(layout=Layout(**layout), **(fields | changes))

    return make


@pytest.fixture
def make_rows() -> Callable[[Manifest, int], Rows]:
    """Return a function that makes the rows of one block, however blocks are cut."""

    def one(manifest: Manifest, position: int) -> tuple:
        generator = np.random.default_rng(position)
        shape = manifest.layout.row_shape
        features = {}
        for readout in manifest.layout.readouts:
            # Representable in float16, so that what is read must equal this exactly.
            features[readout] = generator.standard_normal(shape).astype(np.float16)
        norms = {name: generator.random(shape[:3]) * 1e6 for name in manifest.layout.readouts}
        return features, norms, generator.random(shape[:2])

    def make(manifest: Manifest, block: int) -> Rows:
        positions = manifest.block_rows(block)
        features, norms, losses = zip(*(one(manifest, each) for each in positions), strict=True)
        readouts = manifest.layout.readouts
        return Rows(
            ids=[f"bild-é-{position}" for position in positions],
            metadata=[{"caption": f'"zwei"\n✓ {p}', "label": p % 3} for p in positions],
            features={r: np.stack([f[r] for f in features]).astype(np.float32) for r in readouts},
            norms={r: np.stack([n[r] for n in norms]).astype(np.float32) for r in readouts},
            losses=np.stack(losses).astype(np.float32),
        )

    return make


@pytest.fixture
def fork() -> multiprocessing.context.ForkContext:
    """Processes that start in a millisecond, and may run functions made in a test."""
    return multiprocessing.get_context("fork")
