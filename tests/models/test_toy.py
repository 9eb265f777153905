"""The small pipeline of a real family: its pixels, its captions, and an adapter that is trained."""

from functools import partial

import pytest
import torch

from dmin.data.shapes import Shapes
from dmin.models.families.stable_diffusion_3 import StableDiffusion3
from dmin.models.toy.small import pixel_vae, stable_diffusion_3
from dmin.runtime.errors import DminError
from dmin.train import LoRA, fit_trainer, train

WORDS = ["a", "red", "star", "on", "white", "background", "ring", "large"]
tiny = partial(stable_diffusion_3, WORDS, size=8, width=16, heads=2, layers=1, text=8)


def test_latents_are_pixels():
    vae = pixel_vae()
    images = 2 * torch.rand(3, 3, 8, 8) - 1
    latents = vae.encode(images).latent_dist.mode()
    assert (latents - images).abs().max() < 1e-3
    assert (vae.decode(latents).sample - images).abs().max() < 2e-3


def test_captions_differ_by_their_words_and_not_by_their_batch():
    torch.manual_seed(0)
    model = tiny()
    one, other = "a red star on a white background", "a large ring on a white background"
    both = model.condition([one, other])
    assert both["encoder_hidden_states"].std() > 0.1
    for name, values in both.items():
        assert (values[0] - values[1]).abs().mean() > 0.1 * values.std()
        assert torch.allclose(values[:1], model.condition([one])[name], atol=1e-5)


def fit(data, **lora):
    return train(
        tiny,
        data,
        steps=3,
        batch_size=4,
        warmup=1,
        ema_decay=0.5,
        lora=LoRA("source", "print", steps=4, rank=2, **lora),
        trainer=fit_trainer(accelerator="cpu", enable_progress_bar=False),
    )


def test_an_adapter_is_trained_on_its_source_alone_and_loaded_again(tmp_path):
    pytest.importorskip("peft")
    data = Shapes(examples=24, size=8, minority=0.4)
    model = fit(data)
    alone = train(  # the network itself: as if there were no prints
        tiny,
        LoRA("source", "print").parts(data)[0],
        steps=3,
        batch_size=4,
        warmup=1,
        ema_decay=0.5,
        trainer=fit_trainer(accelerator="cpu", enable_progress_bar=False),
    )
    model.save_pretrained(tmp_path / "model")
    settings = {"max_sequence_length": 16}
    base = StableDiffusion3.from_pretrained(tmp_path / "model", **settings)
    for name, value in alone.network.named_parameters():
        assert torch.equal(value, base.network.get_parameter(name)), name
    adapter = tmp_path / "model" / "lora"
    found = StableDiffusion3.from_pretrained(tmp_path / "model", adapter=adapter, **settings)
    trained = dict(model.network.named_parameters())
    loaded = dict(found.network.named_parameters())
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    assert all(value.abs().max() > 0 for name, value in loaded.items() if "lora_B" in name)


def test_a_source_that_nothing_has_is_refused():
    with pytest.raises(DminError, match=r"0 of 4 examples have source=print"):
        fit(Shapes(examples=4, size=8, minority=0.0))
