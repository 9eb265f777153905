"""What holds of every family: its claims of the network are those of the real pipeline.

No weights decide these tests: with the best network for one x0 the real pipeline ends at x0, the
autoencoder is asked to decode what normalises to x0, and what the network says is what the pipeline
hands its scheduler.
"""

import copy
import os
from contextlib import contextmanager

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.normalization import FP32LayerNorm
from models.families import EVERY, PAIRS, checkpoint, load
from models.test_against_pipelines import sized
from models.test_families import examples, inputs

from dmin.attribution.retrieval import retrieve
from dmin.cli.config.groups import groups
from dmin.collect import GradientCollector, predict_trainer
from dmin.diffusion.inputs import NoisedBatch
from dmin.diffusion.timesteps import Explicit
from dmin.doctor.checks import SAMPLER_LIMIT, sampler
from dmin.doctor.gradients import compare
from dmin.models.oracle import example_given, sampling_error
from dmin.models.recognition import recognise
from dmin.models.vae import latent_channels
from dmin.queries import Planted
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic

CASES = [(name, kind) for name, f in EVERY.items() for kind in f.predictions]
# Samplers that stop before all noise is gone (set_alpha_to_one: false), or round their timesteps.
ENDS_EARLY = {
    "stable_diffusion": 0.06,
    **dict.fromkeys(("stable_diffusion_xl", "stable_diffusion_xl_refiner"), 0.06),
    "dit": 0.06,
    "sana": 2e-3,
    **dict.fromkeys(("wan", "wan_clips", "wan_2_2"), 3e-3),
    **{name: 0.06 for name in PAIRS if "flux" not in name},
}


@contextmanager
def statistics(autoencoder):
    """Have an autoencoder with numbers that no family has by chance."""
    before, tensors = dict(autoencoder.config), copy.deepcopy(autoencoder.state_dict())
    by_channel = torch.rand(2, latent_channels(before), generator=torch.Generator().manual_seed(3))
    if hasattr(autoencoder, "bn"):
        autoencoder.bn.running_mean.copy_(by_channel[0].repeat(4))
        autoencoder.bn.running_var.copy_(by_channel[1].repeat(4) + 0.5)
    elif before.get("latents_mean") is not None:
        mean, std = by_channel[0].tolist(), (by_channel[1] + 0.5).tolist()
        autoencoder.register_to_config(latents_mean=mean, latents_std=std)
    else:
        changes = {"scaling_factor": 0.7, "shift_factor": 0.3}
        autoencoder.register_to_config(**{k: v for k, v in changes.items() if k in before})
    yield
    autoencoder.load_state_dict(tensors)
    autoencoder.register_to_config(**{k: v for k, v in before.items() if not k.startswith("_")})


def test_every_family_is_held_to_this():
    assert {*(f.model.family for f in EVERY.values()), "auto", "ddpm", "mlp"} == set(
        groups()["model"]
    )


def test_it_is_held_to_this_with_its_text_encoders_too():
    kept = load("stable_diffusion", "epsilon")
    model = type(kept)(kept.pipeline, text_encoders="trained")
    assert model.encodes_inside
    assert sampling_error(model) <= ENDS_EARLY["stable_diffusion"]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_best_network_for_one_image_leads_the_pipeline_to_it(name, kind):
    model = load(name, kind)
    forward, decode = model.network.forward, model.pipeline.vae.decode
    with statistics(model.pipeline.vae):
        assert sampling_error(model) <= ENDS_EARLY.get(name, 1e-5)
    assert model.network.forward == forward and model.pipeline.vae.decode == decode


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("claim", ["sign", "time", "shifted"])
def test_a_claim_that_is_wrong_is_found(name, claim, monkeypatch):
    model = load(name)
    other = {"sign": -model.sign, "shifted": not model.shifted}
    if claim == "time":
        right = type(model)._time
        monkeypatch.setattr(type(model), "_time", lambda self, t: right(self, t.flip(0)))
    else:
        monkeypatch.setattr(type(model), claim, other[claim])
    with statistics(model.pipeline.vae):
        moved = "shift_factor" in model.pipeline.vae.config
        if claim == "shifted" and not (moved and not model.pipeline.vae.config.get("latents_mean")):
            return
        assert not sampling_error(model) <= SAMPLER_LIMIT
        (check,) = sampler(model)
        assert not check.passed and "sign, time unit" in check.remedy


def test_a_family_by_hand_has_no_sampler_to_be_held_to(ddpm):
    assert sampler(ddpm) == [] == sampler(load("stable_diffusion_3", target="noise"))


@pytest.mark.parametrize("name", EVERY)
def test_predictions_are_what_the_pipeline_hands_its_scheduler(name, monkeypatch):
    family = EVERY[name]
    model = load(
        name, **{"guidance_scale": 1.0, **family.unguided}
    )  # one call of the network a step
    scheduler, prompt, handed = model.pipeline.scheduler, family.prompts[0], []
    step = scheduler.step

    def watched(output, t, sample, *args, **kwargs):
        handed.append((output, t, sample))
        return step(output, t, sample, *args, **kwargs)

    monkeypatch.setattr(scheduler, "step", watched)
    # The pipelines of inpainting draw the latents of what is left; here all are the mode.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator: self.mode())
    given = example_given(model)
    model.sample([prompt], [7], 2, given)
    if name == "qwen_image_edit":  # whose text encoder is shown the image
        condition = model._prompted({**given, "id": ["a"], "caption": [prompt]})
    else:
        condition = {**model.condition([prompt]), **model._sizes(sized(family.size, family.size))}
    if model.reads_condition_images({}):
        condition["beside"] = model._beside({**given, "id": ["a"]})
    assert len(handed) == 2
    for output, t, sample in handed:
        noised, expected = (model._latents(x, (1, *family.latent)) for x in (sample, output))
        with torch.no_grad():
            found = model._predict(noised, model.process.time(t[None]), condition)
        found = found[:, : expected.shape[1]]  # without a learned variance
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_klein_is_flux_2_without_a_guidance_that_it_is_told():
    model = load("flux_2")
    folder = checkpoint("flux_2", guidance_embeds=False)
    klein = type(model).from_pretrained(folder, **EVERY["flux_2"].settings)
    assert type(klein.pipeline).__name__ == "Flux2KleinPipeline"
    assert klein.describe()["embedded_guidance"] is None
    assert sampling_error(klein) <= 1e-5 and recognise(folder).family == "flux_2"


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_a_caption_is_padded_after_its_own_tokens_whatever_else_is_encoded(name):
    model = load(name)
    given = ["a red cat", "dog"]
    text, mask = model.condition(given).values()
    assert given == ["a red cat", "dog"] and mask.sum(1).tolist() == [8, 6]
    assert not text[~mask].any()
    alone, _ = model.condition(["dog"]).values()
    assert torch.equal(alone[0], text[1])


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "flux_2"])
def test_text_encoders_that_a_pass_cannot_repeat_are_refused(name):
    settings = {**EVERY[name].settings, "text_encoders": "trained"}
    model = EVERY[name].model.from_pretrained(checkpoint(name), **settings)
    with pytest.raises(DminError, match=r"Set model\.text_encoders=frozen"):
        model.condition(["a red cat", "dog"])
    assert sampling_error(model) <= 1e-5


# Every one by `make conformance`.
DOUBLE = list(EVERY) if os.environ.get("DMIN_CONFORMANCE") else ["lumina_2"]


@pytest.mark.parametrize("name", DOUBLE)
def test_in_double_precision_gradients_are_autograds_to_ten_digits(name):
    model = load(name, torch_dtype="float64")
    x0, noise, t, condition = inputs(model, EVERY[name])
    collector = GradientCollector(model, BlockCyclic(256))
    batch = NoisedBatch(x0.double(), noise.double(), t, condition)
    found = compare(model, collector.attributed, batch, "loss", collector.budget)
    # Some layers compute in float32 whatever they are given, and so does autograd in them.
    single = {n for n, m in model.network.named_modules() if isinstance(m, FP32LayerNorm)}
    errors = found.errors().items()
    assert max(e for n, e in errors if n.rpartition(".")[0] not in single) <= 1e-10
    assert max(e for n, e in errors) <= 1e-6 and found.mixing() <= 1e-6


@pytest.mark.parametrize("name", DOUBLE)
def test_a_planted_copy_is_found_first(name, tmp_path):
    family, model = EVERY[name], load(name)
    collector = GradientCollector(model, BlockCyclic(1024), Explicit(family.timesteps[:1]))
    data, options = (
        examples(family),
        {"block_size": 3, "trainer": predict_trainer(accelerator="cpu", enable_progress_bar=False)},
    )
    train = collector.collect(data, tmp_path / "train", **options)
    copies = Planted(count=3).plant(data)
    asked = collector.collect(copies, tmp_path / "asked", as_queries=True, **options)
    found = retrieve(asked, train, k=2)
    assert [row[0] for row in found.train_ids] == [e.id for e in data.examples]
    assert (found.scores[:, 0] > 1 - 1e-5).all()
