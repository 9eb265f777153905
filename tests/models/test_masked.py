"""Masks of the loss: each place counts as much as its mask says, and no network is told of them."""

from dataclasses import replace

import pytest
import torch
from models.tiny import save

from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Examples
from dmin.data.base import Example, collate
from dmin.diffusion import Explicit, SharedNoise
from dmin.models import StableDiffusion
from dmin.models.base import READOUTS, Prediction
from dmin.models.masked import MASK, encode, predict
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic

TIMESTEPS = [800, 300]


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd"
    save("stable_diffusion", folder)
    return StableDiffusion.from_pretrained(folder)


def examples(count=3, size=16, channels=3):
    """Examples of which the last has no mask."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        image = torch.rand(channels, size, size, generator=generator)
        mask = torch.rand(1, size, size, generator=generator).square() if number else None
        found.append(Example(f"e{number}", image, number, f"a cup {number}", mask=mask))
    return found[::-1]


def by_hand(model, example, timesteps, noise):
    """The gradient of the masked loss, written out, of all parameters, one example alone."""
    x0, condition = model.encode(collate([replace(example, mask=None)]))
    mask = torch.ones(1, 1, *x0.shape[2:])
    if example.mask is not None:
        side = example.mask.shape[-1] // x0.shape[-1]
        blocks = example.mask.reshape(1, 1, x0.shape[2], side, x0.shape[3], side)
        mask = blocks.mean((3, 5))
    found = []
    for t in timesteps:
        drawn = noise(x0.shape[1:], t, 0, "")[None]
        out = model.predict(x0, drawn, torch.tensor([t]), condition)
        error = out.prediction - out.target
        loss = (out.weight * (mask * error * error).mean()).sum()
        names = [p for p in model.network.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, names, allow_unused=True)
        found.append(
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for p, g in zip(names, grads, strict=True)
                ]
            )
        )
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_a_store_holds_the_gradients_of_the_masked_loss(kind, stable_diffusion, ddpm, tmp_path):
    model = stable_diffusion if kind == "latents" else ddpm
    data = examples() if kind == "latents" else examples(size=8, channels=1)
    noise = SharedNoise()
    sketch = BlockCyclic(2**12)
    settings = {"timesteps": Explicit(TIMESTEPS), "noise": noise, "microbatch": 4}
    collector = GradientCollector(model, sketch, **settings)

    def collected(data, name):
        trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
        path = tmp_path / name
        return collector.collect(Examples(data), path, trainer=trainer, dtype="float32")

    store = collected(data, "store")
    other = collected([replace(e, mask=None) for e in data], "plain")
    for row, example in enumerate(data):
        gradient = by_hand(model, example, TIMESTEPS, noise)
        norms = store.norms("loss")[row, 0, :, 0]
        torch.testing.assert_close(torch.tensor(norms), gradient.norm(dim=1), rtol=1e-4, atol=1e-7)
        same = (store.norms("loss")[row] == other.norms("loss")[row]).all()
        assert same == (example.mask is None)


def test_a_mask_of_ones_changes_nothing_and_halves_halve(stable_diffusion):
    (example, *_) = examples()
    x0, condition = encode(stable_diffusion, collate([replace(example, mask=None)]))
    from dmin.diffusion.inputs import NoisedBatch
    from dmin.models.base import per_example_loss

    def loss(value):
        shape = (1, 1, *x0.shape[2:])
        more = {} if value is None else {MASK: torch.full(shape, value)}
        batch = NoisedBatch(x0, torch.ones_like(x0), torch.tensor([500]), {**condition, **more})
        return per_example_loss(predict(stable_diffusion, batch))

    assert torch.equal(loss(None), loss(1.0))
    torch.testing.assert_close(loss(0.5), loss(None) / 2)


def test_another_loss_than_the_squared_error_refuses_masks(stable_diffusion, tmp_path):
    save("stable_diffusion", tmp_path / "sd")
    model = StableDiffusion.from_pretrained(tmp_path / "sd", loss_type="huber")
    collector = GradientCollector(model, BlockCyclic(256), timesteps=Explicit(TIMESTEPS))
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(DminError, match="loss masks"):
        collector.collect(Examples(examples()), tmp_path / "store", trainer=trainer)


@pytest.mark.parametrize("readout", ["mean_squared_output", "mean_output"])
def test_other_readouts_count_places_as_the_loss_does(readout):
    draw = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 4, 4, generator=draw), torch.zeros(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 2
    found = READOUTS[readout](Prediction(output, target, torch.ones(2), mask=mask))
    part = output[..., :2].square() if "squared" in readout else output[..., :2]
    assert torch.allclose(found, part.flatten(1).mean(1))
