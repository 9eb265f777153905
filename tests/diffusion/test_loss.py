"""Losses of training scripts against their own formulas, and against diffusers' functions."""

import math

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr
from toy_ddpm import TINY_UNET

from dmin.diffusion.loss import LossSettings
from dmin.diffusion.noise import SharedNoise
from dmin.models.base import per_example_loss, weight_of_squares
from dmin.models.families.ddpm import DDPM
from dmin.models.schedulers import process_of
from dmin.runtime.errors import DminError

X0 = torch.randn(3, 4, 6, 6)
NOISE, OUTPUT = torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6)
FLOW = FlowMatchEulerDiscreteScheduler()
KINDS = {
    "epsilon": DDPMScheduler(),
    "v_prediction": DDPMScheduler(prediction_type="v_prediction"),
    "sample": DDPMScheduler(prediction_type="sample"),
    "flow": FLOW,
    "edm": EDMEulerScheduler(),
    "edm_v": EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0),
}


def times(process):
    return torch.tensor([process.timesteps[i] for i in (40, 500, 950)])


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_of_x0_makes_it_the_squared_error_of_x0(kind):
    process = process_of(KINDS[kind], LossSettings(weighting="x0"))
    t = times(process)
    noised = process(X0.double(), NOISE.double(), t)
    found = noised.weight * (OUTPUT - noised.target).square().flatten(1).mean(1)
    levels = process.levels(t, noised.sample)
    x0 = process.x0(levels, noised.sample, OUTPUT.double())
    torch.testing.assert_close(found, (x0 - X0).square().flatten(1).mean(1))


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_weights_of_flows_are_those_of_diffusers(scheme):
    process = process_of(FLOW, LossSettings(weighting=scheme))
    t = times(process)
    expected = compute_loss_weighting_for_sd3(scheme, t / 1000)
    torch.testing.assert_close(process(X0, NOISE, t).weight, expected)


def test_x0_of_a_flow_is_the_preconditioned_loss_of_diffusers_script():
    process, sigma = process_of(FLOW, LossSettings(weighting="x0")), torch.tensor([0.9, 0.5, 0.1])
    noised = process(X0, NOISE, 1000 * sigma)
    s = sigma.view(-1, 1, 1, 1)
    prediction = OUTPUT * (-s) + noised.sample  # precondition_outputs=1
    expected = (prediction - X0).square().flatten(1).mean(1)
    found = noised.weight * (OUTPUT - noised.target).square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_is_that_of_diffusers_script(kind):
    scheduler = KINDS[kind]
    process = process_of(scheduler, LossSettings(snr_gamma=5.0))
    t = times(process)
    snr = compute_snr(scheduler, t)
    expected = torch.stack([snr, 5 * torch.ones_like(snr)], 1).min(1)[0]
    expected = expected / snr if kind == "epsilon" else expected / (snr + 1)
    torch.testing.assert_close(process(X0, NOISE, t).weight, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_offset_is_in_the_input_and_in_the_target(kind):
    plain, offset = process_of(KINDS[kind]), process_of(KINDS[kind], LossSettings(noise_offset=0.3))
    t = times(plain)
    noised = offset(X0, NOISE, t)
    levels = plain.levels(t, X0)
    noise = (noised.sample - levels.alpha * X0) / levels.sigma
    z = (noise - NOISE) / 0.3
    flat = z.flatten(2)
    assert (flat - flat[..., :1]).abs().max() <= 1e-2  # one number a channel
    assert flat[..., 0].std() > 0.3
    torch.testing.assert_close(noised.target, plain(X0, noise, t).target, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perturbation_is_in_the_input_alone(kind):
    settings = LossSettings(input_perturbation=0.2)
    plain, perturbed = process_of(KINDS[kind]), process_of(KINDS[kind], settings)
    t = times(plain)
    noised, levels = perturbed(X0, NOISE, t), plain.levels(t, X0)
    assert torch.equal(noised.target, plain(X0, NOISE, t).target)
    z = ((noised.sample - levels.alpha * X0) / levels.sigma - NOISE) / 0.2
    assert z.std() == pytest.approx(1, abs=0.15) and abs(z.mean()) < 0.3
    assert abs((z * NOISE).mean()) < 0.2


@pytest.mark.parametrize("settings", [{"noise_offset": 0.1}, {"input_perturbation": 0.1}])
def test_examples_of_one_noise_share_what_is_added(settings):
    process = process_of(DDPMScheduler(), LossSettings(**settings))
    draw = SharedNoise(draws=2, antithetic=True)
    noise, minus = (draw((4, 6, 6), 500, d)[None] for d in (0, 1))
    t = torch.tensor([500])
    zero = torch.zeros(1, 4, 6, 6)
    alone = process(zero, noise, t).sample
    assert torch.equal(alone, process(zero, noise, t).sample)
    both = process(torch.cat([zero, zero + 1]), noise.repeat(2, 1, 1, 1), t.repeat(2)).sample
    torch.testing.assert_close(both[:1], alone)
    torch.testing.assert_close(process(zero, minus, t).sample, -alone)
    other = process(zero, draw((4, 6, 6), 400)[None], t).sample
    assert not torch.equal(other - noise, alone - noise)
    # At one place of a field, examples of other shapes have the same.
    fields = SharedNoise(shapes="field")
    small, large = (
        process(torch.zeros(1, 4, s, s), fields((4, s, s), 500)[None], t).sample for s in (4, 8)
    )
    torch.testing.assert_close(small, large[..., 2:6, 2:6])


@pytest.mark.parametrize("schedule", ["snr", "exponential", "constant"])
@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
@pytest.mark.parametrize("kind", KINDS)
def test_bounded_errors_are_those_of_the_scripts(kind, loss_type, schedule):
    settings = LossSettings(loss_type=loss_type, huber_c=0.2, huber_schedule=schedule)
    if schedule == "snr" and kind in ("flow", "edm", "edm_v"):
        with pytest.raises(DminError, match=r"model\.huber_schedule=snr"):
            process_of(KINDS[kind], settings)
        return
    if schedule == "exponential" and kind.startswith("edm"):
        with pytest.raises(DminError, match=r"Allowed are constant"):
            process_of(KINDS[kind], settings)
        return
    process = process_of(KINDS[kind], settings)
    t = times(process)
    noised = process(X0, NOISE, t)
    found = process.loss(noised, OUTPUT, t)
    for i in range(3):
        c = 0.2
        if schedule == "exponential":
            c = math.exp(math.log(0.2) / 1000 * float(t[i]))
        if schedule == "snr":
            bar = KINDS[kind].alphas_cumprod[int(t[i])].item()
            c = (1 - 0.2) / (1 + math.sqrt((1 - bar) / bar)) ** 2 + 0.2
        d = OUTPUT[i] - noised.target[i]
        expected = (2 * ((d**2 + c**2).sqrt() - c)).mean() * (c if loss_type == "huber" else 1)
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-6)


def test_the_losses_reach_the_readout_and_the_curvature_is_refused():
    torch.manual_seed(0)
    network = UNet2DModel(**{**TINY_UNET, "num_class_embeds": None})
    plain = DDPM(network, DDPMScheduler())
    bounded = DDPM(network, DDPMScheduler(), loss_type="huber", huber_schedule="constant")
    x0, noise, t = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([700, 3])
    found, squared = bounded.predict(x0, noise, t, {}), plain.predict(x0, noise, t, {})
    d, c = (squared.prediction - squared.target).flatten(1), 0.1
    expected = (2 * c * ((d**2 + c**2).sqrt() - c)).mean(1)
    torch.testing.assert_close(per_example_loss(found), expected)
    assert torch.equal(weight_of_squares(squared), torch.ones(2))
    with pytest.raises(DminError, match="curvature assumes a squared error"):
        weight_of_squares(found)


def test_what_is_off_its_default_is_described_and_nothing_else():
    plain = process_of(DDPMScheduler()).describe()
    described = {str(plain)}
    off = [
        {"weighting": "x0"},
        {"noise_offset": 0.1},
        {"input_perturbation": 0.1},
        {"loss_type": "huber"},
        {"loss_type": "smooth_l1"},
        {"loss_type": "huber", "huber_c": 0.3},
        {"loss_type": "huber", "huber_schedule": "constant"},
    ]
    for settings in off:
        found = process_of(DDPMScheduler(), LossSettings(**settings)).describe()
        assert set(found) - set(plain) <= set(LossSettings._fields)
        described.add(str(found))
    assert len(described) == 1 + len(off)
    unused = LossSettings(huber_c=0.3, huber_schedule="constant")
    assert process_of(DDPMScheduler(), unused).describe() == plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "cosmap"}, r"model\.weighting=cosmap: this checkpoint is a DiscreteDiff"),
        ({"weighting": "mine"}, "allowed are None, x0, sigma_sqrt, cosmap"),
        ({"noise_offset": -1}, "noise_offset=-1: give 0 or a positive"),
        ({"huber_c": 0}, "huber_c=0: give a positive"),
        ({"input_perturbation": math.nan}, "input_perturbation=nan: give 0 or a positive"),
        ({"loss_type": "l1"}, "allowed are l2, huber, smooth_l1"),
        ({"snr_gamma": 5, "weighting": "x0"}, "both weight timesteps"),
        ({"snr_gamma": 0}, "snr_gamma=0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(DminError, match=message):
        process_of(DDPMScheduler(), LossSettings(**settings))


def test_min_snr_is_of_discrete_diffusions():
    for scheduler in (FLOW, EDMEulerScheduler()):
        with pytest.raises(DminError, match=r"model\.snr_gamma=5.*Allowed are only null"):
            process_of(scheduler, LossSettings(snr_gamma=5))
