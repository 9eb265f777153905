"""Every family: loaded from disk as diffusers saved it, held to formulas and to plain autograd."""

import json

import diffusers
import pytest
import torch
from models.families import EVERY, FAMILIES, ROWS, checkpoint, load, sample, shown
from models.tiny import stable_diffusion, unet

from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Example, Examples, collate
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Explicit
from dmin.models.base import per_example_loss
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic

CASES = [(name, kind) for name, f in EVERY.items() for kind in f.predictions]


def examples(family, n=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(n, *family.shape, generator=generator)
    found = []
    for i, prompt in enumerate(family.prompts[:n]):
        known = {"label" if isinstance(prompt, int) else "caption": prompt}
        found.append(Example(f"example-{i}", images[i], **known, **shown(family.model, images[i])))
    return Examples(found)


def inputs(model, family, n=3, t=(700, 20, 400)):
    x0, condition = model.encode(collate(examples(family, n).examples))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    return x0, noise, torch.tensor(t[:n]), condition


@pytest.mark.parametrize("name", FAMILIES)
def test_it_loads_from_disk_ready_to_be_differentiated(name):
    model = load(name)
    assert not any(module.training for module in model.modules())
    assert [child for child, _ in model.named_children()] == ["network"]
    assert not any(p.requires_grad for e in model.encoders.values() for p in e.parameters())
    assert "vae" in model.encoders and model.network not in model.encoders.values()
    assert list(model.timesteps) == sorted(model.timesteps, reverse=True)


@pytest.mark.parametrize("name", EVERY)
def test_encoding_has_the_shapes_of_the_family_and_repeats_itself(name):
    family, model = EVERY[name], load(name)
    x0, _, _, condition = inputs(model, family)
    assert x0.shape == (3, *family.latent) and x0.dtype == torch.float32
    assert {k: tuple(v.shape[1:]) for k, v in condition.items()} == family.condition
    again, _, _, condition_again = inputs(model, family)
    assert torch.equal(x0, again)
    for key, value in condition.items():
        assert len(value) == 3 and torch.equal(value, condition_again[key])
    alone, _, _, condition_alone = inputs(model, family, 1)
    torch.testing.assert_close(alone, x0[:1])
    torch.testing.assert_close(condition_alone, {k: v[:1] for k, v in condition.items()})


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_target_is_that_of_the_prediction_type(name, kind):
    family, model = EVERY[name], load(name, kind)
    x0, noise, t, condition = inputs(model, family)
    with torch.no_grad():
        prediction, target, weight, *_ = model.predict(x0, noise, t, condition)
    assert prediction.shape == target.shape == x0.shape
    assert torch.equal(weight, torch.ones(3))
    if kind == "flow":
        torch.testing.assert_close(target, noise - x0)
        return
    alpha = model.pipeline.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    v = alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
    torch.testing.assert_close(target, {"epsilon": noise, "v_prediction": v, "sample": x0}[kind])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_network_sees_the_noised_latents(name):
    """At the least noise a latent of the image, at the most noise alone: both by the formula."""
    family, model = FAMILIES[name], load(name)
    x0, noise, t, _ = inputs(model, family)
    seen = model.process(x0, noise, t).sample
    if hasattr(model.process, "scheduler"):
        alpha = model.process.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        expected = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    else:
        sigma = (t / 1000).view(-1, *[1] * (x0.ndim - 1))
        expected = (1 - sigma) * x0 + sigma * noise
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_depends_on_its_own_prompt_and_seed(name):
    family, model = FAMILIES[name], load(name)
    prompts = list(family.prompts[:2])
    both = sample(model, prompts, [3, 4], 2)
    assert both.shape == (2, *family.shape)
    assert both.min() >= 0 and both.max() <= 1 and both.std() > 0
    assert torch.equal(both, sample(model, prompts, [3, 4], 2))
    torch.testing.assert_close(sample(model, prompts[1:], [4], 2), both[1:], atol=1e-4, rtol=0)
    assert (sample(model, prompts[1:], [5], 2) - both[1:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_what_defines_the_loss_is_described(name):
    family, model = FAMILIES[name], load(name)
    described = [load(name, kind).describe() for kind in family.predictions]
    assert len({str(d) for d in described}) == len(described)
    assert str(load(name, latent_seed=1).describe()) == str(model.describe())
    other = family.model.from_pretrained(checkpoint(name), **family.settings)
    assert other.describe() == model.describe()
    with torch.no_grad():
        next(other.encoders["vae"].parameters()).add_(1)
    other = family.model(other.pipeline, **family.settings)
    assert other.describe() != model.describe()


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_sketches_of_one_example_at_a_time(name, tmp_path):
    family, model = EVERY[name], load(name)
    dataset, noise = examples(family), SharedNoise(seed=5)
    collector = GradientCollector(
        model, BlockCyclic(256), Explicit(family.timesteps), noise, microbatch=4
    )
    assert collector.attributed.count == sum(p.numel() for p in model.network.parameters())
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    store = collector.collect(
        dataset, tmp_path / "store", block_size=2, dtype="float32", trainer=trainer
    )
    for row in range(3):
        # In its block, because encoders round otherwise for an image alone.
        block = dataset.examples[row // 2 * 2 : row // 2 * 2 + 2]
        encoded = model.encode(collate(block))
        for step, t in enumerate(collector.timesteps):
            expected = one_sketch(model, collector, encoded, row % 2, t, noise)
            found = torch.from_numpy(store.features("loss", row, row + 1)[0, 0, step])
            assert (found - expected).norm() <= 1e-5
    assert torch.isfinite(torch.from_numpy(store.losses())).all()


def one_sketch(model, collector, encoded, row, t, noise):
    """The sketch of one example's unit gradient by plain autograd."""
    chosen = {entry.name for entry in collector.attributed.entries}
    parameters = {n: p for n, p in model.network.named_parameters() if n in chosen}
    x0, condition = encoded[0][[row]], {k: v[[row]] for k, v in encoded[1].items()}
    drawn = noise(x0.shape[1:], t)[None]
    required = {n: p.requires_grad for n, p in model.network.named_parameters()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    loss = per_example_loss(model.predict(x0, drawn, torch.tensor([t]), condition)).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    for n, p in model.network.named_parameters():
        p.requires_grad_(required[n])
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    named = zip(parameters, gradients, strict=True)
    return collector.sketch.of({n: (g / norm)[None] for n, g in named})[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_decides_generated_images_is_described(name):
    family, model = FAMILIES[name], load(name)
    described = json.dumps(model.describe_sampling())
    sample(model, list(family.prompts[:1]), [0], 2)
    assert json.dumps(model.describe_sampling()) == described
    assert json.dumps(load(name, guidance_scale=2.5).describe_sampling()) != described
    assert json.dumps(model.describe()) == json.dumps(load(name, guidance_scale=2.5).describe())


CAPTIONED = [name for name, family in FAMILIES.items() if isinstance(family.prompts[0], str)]


@pytest.mark.parametrize("name", CAPTIONED)
def test_missing_and_empty_captions_are_refused_by_name(name):
    family, model = FAMILIES[name], load(name)
    image = torch.rand(*family.shape)
    with pytest.raises(DminError, match="'lonely' has no caption"):
        model.encode(collate([Example("lonely", image)]))
    empty = collate([Example("mute", image, caption=" ", **shown(model, image))])
    with pytest.raises(DminError, match=r"'mute' has an empty caption.*empty_captions=keep"):
        model.encode(empty)
    kept = load(name, empty_captions="keep")
    assert kept.encode(empty)[0].shape == (1, *family.latent)
    with pytest.raises(DminError, match="prompt 3 is not text"):
        model.sample([3], [0], 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_that_do_not_fit_are_refused(name):
    family, model = FAMILIES[name], load(name)
    for shape in ((4, *family.shape[1:]), (*family.shape[:-1], family.size + 1)):
        example = Example("a", torch.rand(*shape), label=1, caption="cat")
        with pytest.raises(DminError, match="multiples of"):
            model.encode(collate([example]))


def test_relatives_that_take_other_inputs_are_refused():
    for changes in ({"in_channels": 9}, {"time_cond_proj_dim": 8}):
        pipeline = stable_diffusion()
        pipeline.register_modules(unet=unet(**changes))
        with pytest.raises(DminError, match="has inputs that model="):
            FAMILIES["stable_diffusion"].model(pipeline)


LAST = {
    "dit": "proj_out_2.weight",
    "pixart": "proj_out.weight",
    "hunyuan_dit": "proj_out.weight",
}


@pytest.mark.parametrize("name", LAST)
def test_the_variance_loss_trains_the_variance_alone(name, tmp_path):
    family = FAMILIES[name]
    plain, whole = load(name), load(name, variance_loss=True)
    encoded = inputs(plain, family)
    with torch.no_grad():
        without, added = plain.predict(*encoded), whole.predict(*encoded)
    assert without.bound is None and (added.bound > 0).all()
    assert torch.equal(without.prediction, added.prediction)
    expected = per_example_loss(without) + added.bound
    torch.testing.assert_close(per_example_loss(added), expected)
    assert whole.describe() != plain.describe()
    # Rows of the last layer that speak of the mean keep their gradient; the others get one.
    gradients = []
    for model in (plain, whole):
        last = dict(model.network.named_parameters())[LAST[name]]
        last.requires_grad_(True)
        with torch.enable_grad():
            loss = per_example_loss(model.predict(*encoded)).sum()
        (found,) = torch.autograd.grad(loss, last)
        last.requires_grad_(False)
        # [patch · patch · (mean, variance), width]
        gradients.append(found.unflatten(0, (-1, 2, plain.network.config.in_channels)))
    torch.testing.assert_close(gradients[0][:, 0], gradients[1][:, 0])
    assert not gradients[0][:, 1].any() and gradients[1][:, 1].abs().max() > 0


def test_a_variance_that_is_not_predicted_cannot_be_trained():
    pipeline = load("dit").pipeline
    pipeline = type(pipeline)(
        transformer=diffusers.DiTTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1,
            attention_head_dim=4, num_attention_heads=2, norm_num_groups=4,
        ),
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
    )  # fmt: skip
    with pytest.raises(DminError, match="predicts no variance"):
        FAMILIES["dit"].model(pipeline, variance_loss=True)
