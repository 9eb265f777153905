"""Noise schedules, targets and weights against their formulas and diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from dmin.diffusion.processes import DiscreteDiffusion, RectifiedFlow
from dmin.diffusion.timesteps import DMinCubic, Explicit, Stratified
from dmin.runtime.errors import DminError

X0, NOISE = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights(kind):
    process = DiscreteDiffusion(DDPMScheduler(prediction_type=kind), snr_gamma=5)
    t = torch.tensor([999, 400, 10])
    alpha = process.scheduler.alphas_cumprod[t]
    snr = alpha / (1 - alpha)
    clipped = torch.minimum(snr, torch.tensor(5.0))
    assert clipped[2] == 5 < snr[2] and clipped[0] == snr[0] < 5
    expected = {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}
    torch.testing.assert_close(process(X0, NOISE, t).weight, expected[kind])
    assert process.describe() != DiscreteDiffusion(DDPMScheduler(prediction_type=kind)).describe()


def test_min_snr_weights_are_finite_where_there_is_no_signal():
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    t = torch.tensor([999, 998, 0])
    for kind in ("epsilon", "v_prediction"):
        config = {**scheduler.config, "prediction_type": kind}
        assert torch.isfinite(
            DiscreteDiffusion(DDPMScheduler(**config), 5)(X0, NOISE, t).weight
        ).all()


def test_settings_of_denoising_are_checked():
    with pytest.raises(DminError, match="prediction_type='flow_prediction'"):
        DiscreteDiffusion(DDPMScheduler(prediction_type="flow_prediction"))
    with pytest.raises(DminError, match="snr_gamma=0"):
        DiscreteDiffusion(DDPMScheduler(), 0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timesteps_of_a_flow_is_the_schedulers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    process = RectifiedFlow(scheduler.config)
    torch.testing.assert_close(torch.tensor(process.timesteps), scheduler.timesteps)
    assert (
        RectifiedFlow(scheduler.config, shift=2.0).timesteps
        == RectifiedFlow({**scheduler.config, "shift": 2}).timesteps
    )
    t = scheduler.timesteps[[0, 300, 990]]
    torch.testing.assert_close(
        process(X0, NOISE, t).sample, scheduler.scale_noise(X0, t, NOISE), atol=1e-5, rtol=1e-5
    )


def test_the_published_timesteps_of_sd3():
    process = RectifiedFlow(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    sigmas = [t / 1000 for t in DMinCubic(10)(process.timesteps)]
    published = [1.0, 0.9997, 0.9973, 0.9908, 0.978, 0.955, 0.916, 0.852, 0.741, 0.527]
    assert sigmas == pytest.approx(published, abs=6e-4)


def test_the_velocity_leads_back_to_the_image():
    process = RectifiedFlow(FlowMatchEulerDiscreteScheduler().config)
    t = torch.tensor([1000.0, 500.0, 1.0])
    sample, velocity, weight = process(X0, NOISE, t)
    torch.testing.assert_close(sample - (t / 1000).view(-1, 1, 1, 1) * velocity, X0)
    torch.testing.assert_close(sample[0], NOISE[0])
    assert weight.tolist() == [1, 1, 1]
    assert torch.equal(
        RectifiedFlow({"num_train_timesteps": 1000}, target="noise")(X0, NOISE, t)[1], NOISE
    )


def test_a_flow_takes_any_timestep_and_no_other():
    timesteps = RectifiedFlow({"num_train_timesteps": 1000, "shift": 3.0}).timesteps
    assert Explicit([500, 0.5])(timesteps) == (500, 0.5)
    for t in (0, 1001):
        with pytest.raises(DminError, match="does not have"):
            Explicit([t])(timesteps)
    assert len(Stratified(10)(timesteps)) == 10


def test_shifts_are_read_where_they_apply():
    assert (
        RectifiedFlow({"num_train_timesteps": 1000, "shift": 3, "use_dynamic_shifting": True}).shift
        == 1
    )
    sampler = {"prediction_type": "flow_prediction", "flow_shift": 3.0, "num_train_timesteps": 1000}
    assert RectifiedFlow(sampler).shift == 3
    with pytest.raises(DminError, match="velocity of a flow"):
        RectifiedFlow({"prediction_type": "epsilon", "num_train_timesteps": 1000})
    with pytest.raises(DminError, match="shift=0"):
        RectifiedFlow({"num_train_timesteps": 1000}, shift=0)


def test_log_snr():
    scheduler = DDPMScheduler()
    alpha = scheduler.alphas_cumprod[500].item()
    found = DiscreteDiffusion(scheduler).log_snr([500])
    assert found == [pytest.approx(math.log(alpha / (1 - alpha)), rel=1e-5)]
    flow = RectifiedFlow({"num_train_timesteps": 1000})
    assert flow.log_snr([1000, 500, 100]) == [-math.inf, 0, pytest.approx(2 * math.log(9))]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_bound_of_a_learned_variance(kind):
    """Against diffusers' own variance and posterior, and torch's KL and normal distribution."""
    scheduler = DDPMScheduler(
        prediction_type=kind, variance_type="learned_range", clip_sample=False
    )
    process, t = DiscreteDiffusion(scheduler), torch.tensor([999, 3, 0])
    x0, noise = X0.double(), NOISE.double()
    noised, right, _ = process(x0, noise, t)
    wrong = right + 0.1 * torch.randn_like(x0)
    values = torch.rand_like(x0).requires_grad_()
    prediction = wrong.clone().requires_grad_()
    found = process.variance_bound(x0, noised, t, prediction, values)
    for i in range(3):
        step = int(t[i])

        def mean(output, at=i, step=step):
            told = torch.cat([output, values[at : at + 1]], 1)
            exact = torch.Generator().manual_seed(0)
            one = scheduler.step(told, step, noised[at : at + 1], exact)
            draw = torch.randn(
                x0[:1].shape, dtype=x0.dtype, generator=torch.Generator().manual_seed(0)
            )
            deviation = scheduler._get_variance(step, values[at : at + 1]).mul(0.5).exp()
            return one.prev_sample - deviation * draw * (step > 0), deviation

        true_mean, _ = mean(right[i : i + 1])
        learned_mean, deviation = mean(wrong[i : i + 1])
        if step == 0:
            # Its posterior variance is zero: the published code takes the one of the next step.
            share = (values[i : i + 1] + 1) / 2
            low = scheduler._get_variance(1, -torch.ones(1))
            deviation = (share * scheduler.betas[0].log() + (1 - share) * low).mul(0.5).exp()
            normal = torch.distributions.Normal(learned_mean, deviation)
            x = x0[i : i + 1]
            below = torch.where(x < -0.999, 0.0, normal.cdf(x - 1 / 255))
            above = torch.where(x > 0.999, 1.0, normal.cdf(x + 1 / 255))
            nats = -(above - below).clamp(min=1e-12).log()
        else:
            before = scheduler.alphas_cumprod[step - 1]
            beta = scheduler.betas[step] * (1 - before) / (1 - scheduler.alphas_cumprod[step])
            true = torch.distributions.Normal(true_mean, beta.sqrt())
            nats = torch.distributions.kl_divergence(
                true, torch.distributions.Normal(learned_mean, deviation)
            )
        expected = nats.mean() / math.log(2)
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-5)
    found.sum().backward()
    assert prediction.grad is None and values.grad.abs().max() > 0
