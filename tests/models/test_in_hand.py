"""A pipeline as it is in a notebook: taken as it is, and left as it is."""

import diffusers
import pytest
import torch
from models.families import EVERY, checkpoint, load
from models.tiny import pixart, stable_diffusion_xl

import dmin
from dmin.data import collate
from dmin.models.base import weights_digest
from dmin.models.oracle import sampling_error
from dmin.runtime.errors import DminError


def state(pipeline):
    """What may not change of a pipeline."""
    modules = {n: c for n, c in pipeline.components.items() if isinstance(c, torch.nn.Module)}
    return {
        "parts": {name: id(component) for name, component in pipeline.components.items()},
        "modes": {n: [m.training for m in c.modules()] for n, c in modules.items()},
        "asked": {n: [p.requires_grad for p in c.parameters()] for n, c in modules.items()},
        "numbers": {n: weights_digest(c) for n, c in modules.items()},
        "vars": sorted(vars(pipeline)),
        "scheduler": dict(pipeline.scheduler.config),
    }


@pytest.mark.parametrize("name", ["flux", "stable_diffusion", "z_image"])
def test_a_pipeline_is_the_model_that_its_folder_is(name):
    family = EVERY[name]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(checkpoint(name), safety_checker=None)
    part = pipeline.components.get("unet") or pipeline.transformer
    part.train()
    before = state(pipeline)
    model = dmin.from_pipeline(pipeline, **family.settings)
    same = load(name)
    assert model.describe() == same.describe() and not model.network.training
    batch = collate([dmin.Example("a", torch.rand(3, 16, 16), caption="a red cat")])
    x0, condition = model.encode(batch)
    noise, t = torch.randn_like(x0), torch.tensor([400])
    found, expected = (m.predict(x0, noise, t, condition) for m in (model, same))
    torch.testing.assert_close(found.prediction, expected.prediction)
    model.sample(["a cat"], [1], 2)
    model.to(torch.bfloat16)
    assert state(pipeline) == before
    own, theirs = next(same.network.parameters()), next(part.parameters())
    torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("variant", ["Img2Img", "PAG"])
def test_a_base_model_in_a_pipeline_that_samples_otherwise_samples_as_its_folder_does(variant):
    torch.manual_seed(0)
    base = stable_diffusion_xl()
    kind = getattr(diffusers, f"StableDiffusionXL{variant}Pipeline")
    held = kind(**base.components, force_zeros_for_empty_prompt=False)
    before = dict(held.config), dict(vars(held))
    model = dmin.from_pipeline(held)
    assert (dict(held.config), dict(vars(held))) == before
    base.register_to_config(force_zeros_for_empty_prompt=False)
    expected = dmin.from_pipeline(base)
    assert model.describe() == expected.describe()
    asked = ["a red cat"], [3], 2
    torch.testing.assert_close(model.sample(*asked), expected.sample(*asked))
    assert sampling_error(model) <= 0.06


def test_weights_are_shared_and_swapped_ones_are_taken():
    pipeline = diffusers.DiffusionPipeline.from_pretrained(checkpoint("pixart"))
    with torch.no_grad():
        next(pipeline.transformer.parameters()).add_(1)  # as an EMA that was copied in
    model = dmin.from_pipeline(pipeline)
    own, theirs = (next(x.parameters()) for x in (model.network, pipeline.transformer))
    assert own is not theirs and own.data_ptr() == theirs.data_ptr()
    assert weights_digest(model.network) != weights_digest(load("pixart").network)


def test_a_pixel_model_in_hand(ddpm):
    pipeline = diffusers.DDPMPipeline(ddpm.network, ddpm.scheduler)
    assert dmin.from_pipeline(pipeline).describe() == ddpm.describe()


def test_what_is_no_whole_pipeline_is_refused():
    pipeline = pixart()
    pipeline.vae = None
    with pytest.raises(DminError, match="has no vae"):
        dmin.from_pipeline(pipeline)
    pipeline = pixart()
    pipeline.transformer.proj_out._hf_hook = object()
    with pytest.raises(DminError, match=r"transformer is moved .*remove_all_hooks"):
        dmin.from_pipeline(pipeline)
    kind = type("KolorsPipeline", (diffusers.DDPMPipeline,), {"__module__": "diffusers.own"})
    with pytest.raises(DminError, match="KolorsPipeline, which no family of dmin opens"):
        dmin.from_pipeline(kind(None, None))
