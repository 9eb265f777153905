"""Examples × (timestep, draw): against the obvious loops."""

import pytest
import torch

from dmin.diffusion.inputs import NoisedExamples
from dmin.diffusion.noise import PerExampleNoise, SharedNoise

TIMESTEPS, IDS = (700, 20, 3), ["cat", "dog"]


@pytest.mark.parametrize("kind", [SharedNoise, PerExampleNoise])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pairs_are_numbered_as_a_store_s_axes(kind, dtype):
    noise = kind(seed=5, draws=2)
    x0 = torch.randn(2, 3, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    condition = {"text": torch.randn(2, 7, 5), "label": torch.tensor([4, 1])}
    inputs = NoisedExamples(noise, TIMESTEPS, x0, condition, IDS)
    expected = [
        (x0[i], noise((3, 4, 4), t, draw, IDS[i]).to(dtype), t, condition["text"][i])
        for i in range(2)
        for draw in range(2)
        for t in TIMESTEPS
    ]
    assert len(inputs) == len(expected) == 2 * inputs.points
    found = inputs.all()
    for number, (x, e, t, text) in enumerate(expected):
        assert torch.equal(found.x0[number], x) and torch.equal(found.noise[number], e)
        assert found.t[number] == t and torch.equal(found.condition["text"][number], text)
    assert found.x0.is_contiguous() and found.t.dtype == torch.int64
    chosen = torch.tensor([11, 0, 7])
    for a, b in zip(inputs.at(chosen)[:3], found.rows(chosen)[:3], strict=True):
        assert torch.equal(a, b)
    pieces = list(found.split(5))
    assert [len(piece.t) for piece in pieces] == [5, 5, 2]
    assert torch.equal(torch.cat([p.condition["label"] for p in pieces]), found.condition["label"])
