"""The process of each class of diffusers' schedulers, held to the optimum for one image.

A network that returns the best answer for a single x0, written from the published contract of the
process, must lead the real sampler to x0 and have a loss of zero.
"""

import inspect
import json
import shutil
import warnings

import diffusers
import diffusers.schedulers
import pytest
import torch
from models.families import checkpoint
from toy_ddpm import TINY_UNET

from dmin.diffusion.processes import EDM, DiscreteDiffusion, RectifiedFlow
from dmin.models import vae
from dmin.models.families.ddpm import DDPM
from dmin.models.families.flux import Flux
from dmin.models.families.stable_diffusion import StableDiffusion
from dmin.models.families.stable_diffusion_xl import StableDiffusionXL
from dmin.models.schedulers import _DISCRETE, process_of
from dmin.runtime.errors import DminError

CLASSES = {
    name.removesuffix("Scheduler"): kind
    for name, kind in inspect.getmembers(diffusers.schedulers, inspect.isclass)
    if name.endswith("Scheduler") and hasattr(kind, "from_config")
}
DISCRETE = [n for n in _DISCRETE if n in CLASSES and "dummy" not in CLASSES[n].__module__]
CONTINUOUS = {
    "timestep_type": "continuous",
    "prediction_type": "v_prediction",
    "use_karras_sigmas": True,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
CASES = [
    *((name, {}) for name in DISCRETE),
    *(
        (n, {"prediction_type": "v_prediction"})
        for n in ("DDIM", "EulerDiscrete", "UniPCMultistep")
    ),
    *((n, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}) for n in ("DDIM",)),
]


def takes(kind, name):
    return name in inspect.signature(kind.__init__).parameters


CASES += [(n, FLOW) for n in DISCRETE if takes(CLASSES[n], "use_flow_sigmas")]
CASES += [
    (name, {"prediction_type": kind, "sigma_data": data})
    for name in ("EDMEuler", "EDMDPMSolverMultistep")
    for kind, data in (("epsilon", 0.5), ("v_prediction", 1.0))
]
CASES += [
    ("EulerDiscrete", CONTINUOUS),
    ("FlowMatchEulerDiscrete", {}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    ("FlowMatchHeunDiscrete", {"shift": 3.0}),
]
# They go from image to noise, or their steps need more than the network's output.
NOT_SAMPLED = {"DDIMInverse", "DPMSolverMultistepInverse", "RePaint", "CogVideoXDPM", "UnCLIP"}


def made(name, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CLASSES[name](**settings)


def optimum(scheduler, x0):
    """Return the network of one image: what it says of (its input, its time)."""
    config, name = scheduler.config, type(scheduler).__name__
    kind = config.get("prediction_type", "epsilon")
    is_flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas")
    is_edm = name.startswith("EDM") or config.get("timestep_type") == "continuous"
    data = config.get("sigma_data", 1.0)

    def says(x, t):
        t = torch.as_tensor(t).double().reshape(-1, *[1] * (x.ndim - 1))
        clean, x = x0.to(x).double(), x.double()
        if is_flow:
            return (x - clean) / (t / 1000).clamp(min=1e-9)  # x_t = x0 + σ (ε − x0)
        if is_edm:
            sigma = (4 * t).exp()
            spread = (sigma**2 + data**2).sqrt()
            out = sigma * data / spread * (1 if kind == "epsilon" else -1)
            return (clean - data**2 / spread**2 * (spread * x)) / out
        bars = scheduler.alphas_cumprod.double()
        low = t.floor().long().clamp(max=len(bars) - 1)
        bar = bars[low] + (t - low) * (bars[(low + 1).clamp(max=len(bars) - 1)] - bars[low])
        noise = (x - bar.sqrt() * clean) / (1 - bar).sqrt()
        if kind == "epsilon":
            return noise
        return bar.sqrt() * noise - (1 - bar).sqrt() * clean

    return says


def answering(monkeypatch, network, says):
    """Have a network give these answers, whatever it is told beside its input and its time."""

    def forward(sample, timestep, *args, return_dict=True, **kwargs):
        # A parameter takes part, as in any network.
        output = says(sample, timestep).to(sample) + 0 * next(network.parameters()).sum()
        return diffusers.models.unets.unet_2d.UNet2DOutput(output) if return_dict else (output,)

    monkeypatch.setattr(network, "forward", forward)


MODELS = {"stable_diffusion": StableDiffusion, "stable_diffusion_xl": StableDiffusionXL}


def loaded(kind, scheduler, monkeypatch):
    """Return a model, the one image of its network, and how it looks."""
    generator = torch.Generator().manual_seed(1)
    if kind == "ddpm":
        x0 = torch.rand(1, 1, 8, 8, generator=generator) * 2 - 1
        model = DDPM(diffusers.UNet2DModel(**TINY_UNET), scheduler)
        look = (x0 + 1) / 2
    else:
        x0 = torch.randn(1, 4, 8, 8, generator=generator)
        model = MODELS[kind].from_pretrained(checkpoint(kind), guidance_scale=1.0)
        model.pipeline.scheduler = scheduler
        model = type(model)(model.pipeline, guidance_scale=1.0)
        with torch.no_grad():
            look = vae.decode(model.pipeline.vae, x0)
    answering(monkeypatch, model.network, optimum(scheduler, x0))
    return model, x0, look


def identity(case):
    return (
        case
        if isinstance(case, str)
        else "-".join([case[0], *(f"{v}" for v in case[1].values() if isinstance(v, str | bool))])
    )


EACH = [
    (kind, case)
    for kind in ("ddpm", "stable_diffusion", "stable_diffusion_xl")
    for case in CASES
    if kind != "stable_diffusion_xl" or case[0] not in DISCRETE or case[1]
]


@pytest.mark.parametrize(("kind", "case"), EACH, ids=identity)
def test_the_network_of_one_image_leads_to_it_and_has_no_loss(kind, case, monkeypatch):
    name, settings = case
    clip = {"clip_sample": False} if takes(CLASSES[name], "clip_sample") else {}
    scheduler = made(name, {**settings, **clip})
    model, x0, look = loaded(kind, scheduler, monkeypatch)
    condition = {} if kind == "ddpm" else {**model.condition(["cat"])}
    if kind == "stable_diffusion_xl":
        condition["time_ids"] = torch.zeros(1, 6)
    timesteps = model.timesteps
    for t in (timesteps[0], timesteps[len(timesteps) // 2], timesteps[-200]):
        noise = torch.randn(x0.shape)
        with torch.no_grad():
            found = model.predict(x0, noise, torch.tensor([t]), condition)
        error = (found.prediction - found.target).abs().max()
        assert error <= 2e-4 * (1 + found.target.abs().max()), t
        levels = model.process.levels(torch.tensor([t]), x0)
        sample = levels.alpha * x0 + levels.sigma * noise
        back = model.process.x0(levels, sample, found.target)
        if levels.alpha.min() > 0.05:
            torch.testing.assert_close(back, x0, atol=2e-3, rtol=1e-3)
    if name in NOT_SAMPLED and kind != "ddpm":
        return
    prompts = [1] if kind == "ddpm" else ["cat"]
    found = model.sample(prompts, [3], 30)
    # Some samplers end at the least noise of the timesteps.
    assert (found - look).abs().mean() <= 2e-2
    assert not hasattr(type(scheduler), "scale_model_input") or "scale_model_input" not in vars(
        scheduler
    )
    states = model.trajectory(prompts, [3], 30, 3)
    assert (states - look).abs().mean() <= 2e-2


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_its_process_or_is_refused_by_name(name):
    kind = CLASSES[name]
    try:
        scheduler = made(name, {})
    except (TypeError, ImportError):  # needs arguments, or a library that is not here
        scheduler = object.__new__(kind)
        if name in _DISCRETE:
            return
    known = {"EDMEuler", "EDMDPMSolverMultistep", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"}
    if name in {*_DISCRETE, *known}:
        expected = EDM if "EDM" in name else RectifiedFlow if "Flow" in name else DiscreteDiffusion
        found = process_of(scheduler)
        assert isinstance(found, expected) and len(found.timesteps) == 1000
    else:
        with pytest.raises(DminError, match=f"{name}Scheduler: .* put the scheduler of its train"):
            process_of(scheduler)


ZERO = {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("name", "settings"),
    [(n, z) for n in DISCRETE for z in ({}, ZERO) if not z or takes(CLASSES[n], *z)],
)
def test_a_discrete_process_has_the_schedulers_own_noise(name, settings):
    scheduler = made(name, settings)
    process = process_of(scheduler)
    assert torch.equal(process.alphas_cumprod, scheduler.alphas_cumprod)
    x0, noise = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 2, 2)
    bar = scheduler.alphas_cumprod[500].float()
    found = process(x0, noise, torch.tensor([500])).sample
    torch.testing.assert_close(found, bar.sqrt() * x0 + (1 - bar).sqrt() * noise)


def test_settings_outlive_an_exchange_of_the_scheduler():
    """They stay in the config of a class that does not know them, and were trained with."""
    zero = diffusers.DDIMScheduler(beta_start=0.001, beta_end=0.013, rescale_betas_zero_snr=True)
    for kind in (diffusers.PNDMScheduler, diffusers.HeunDiscreteScheduler):
        exchanged = process_of(kind.from_config(zero.config))
        assert (exchanged.alphas_cumprod - zero.alphas_cumprod).abs().max() <= 1e-6
        assert exchanged.describe()["rescale_betas_zero_snr"]


def test_the_shift_of_videos_is_told_apart_off_its_default():
    plain, video = diffusers.DDPMScheduler(), diffusers.CogVideoXDDIMScheduler(snr_shift_scale=2.0)
    assert "snr_shift_scale" not in process_of(plain).describe()
    unshifted = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.0)
    assert process_of(video).describe() != process_of(unshifted).describe()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("DPMSolverMultistep", {"use_flow_sigmas": True}, "use_flow_sigmas=True with prediction"),
        ("UniPCMultistep", {"prediction_type": "flow_prediction"}, "use_flow_sigmas=False"),
        ("EulerDiscrete", {"prediction_type": "flow_prediction"}, "use_flow_sigmas=False"),
        ("DDPM", {"prediction_type": "velocity"}, "prediction_type='velocity'"),
        ("EDMEuler", {"prediction_type": "sample"}, "allowed are epsilon and v_prediction"),
        ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, "invert_sigmas=True"),
        ("FlowMatchEulerDiscrete", {"num_train_timesteps": 1}, "num_train_timesteps=1"),
    ],
)
def test_settings_that_contradict_a_class_are_refused(name, settings, message):
    with pytest.raises(DminError, match=message):
        process_of(made(name, settings))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {"beta_start": float("nan")}) for name in DISCRETE if name != "UnCLIP"),
        ("DDPM", {"beta_start": -0.1}),
        ("EulerDiscrete", {"trained_betas": [0.1, 1.5, 0.1]}),
        ("DDPM", {"num_train_timesteps": 0}),
        ("EDMEuler", {"num_train_timesteps": 0}),
        ("EDMEuler", {"sigma_data": 0.0}),
        ("EDMDPMSolverMultistep", {"sigma_data": -1.0}),
        ("EDMEuler", {"sigma_data": float("nan")}),
        ("FlowMatchEulerDiscrete", {"shift": float("nan")}),
        ("FlowMatchHeunDiscrete", {"shift": 0.0}),
    ],
)
def test_settings_without_levels_of_noise_are_refused(name, settings):
    """They are checked with all timesteps, not where a collection would take its gradients."""
    with pytest.raises(DminError, match=r"scheduler.*Fix|shift=(nan|0.0)"):
        process_of(made(name, settings))


def test_a_users_own_scheduler_is_that_of_the_class_it_is_made_of():
    class Own(diffusers.DDIMScheduler):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.alphas_cumprod = self.alphas_cumprod**2

    own = Own()
    assert torch.equal(process_of(own).alphas_cumprod, own.alphas_cumprod)


def test_settings_of_another_process_are_refused():
    with pytest.raises(DminError, match=r"model\.shift=2.*EDM"):
        process_of(diffusers.EDMEulerScheduler(), shift=2)
    assert process_of(diffusers.FlowMatchEulerDiscreteScheduler(), shift=2).shift == 2


def test_a_process_that_a_family_does_not_have_is_refused(tmp_path):
    pipeline = Flux.from_pretrained(checkpoint("flux")).pipeline
    pipeline.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(DminError, match=r"DDIMScheduler .* DiscreteDiffusion, but Flux is trained"):
        Flux(pipeline)


def test_a_saved_ddpm_is_what_its_scheduler_says(tmp_path):
    """Karras' preconditioning was once read as a discrete diffusion with linear betas."""
    scheduler = diffusers.EDMEulerScheduler(sigma_data=1.0)
    pipeline = diffusers.DDPMPipeline(diffusers.UNet2DModel(**TINY_UNET), scheduler)
    pipeline.save_pretrained(str(tmp_path))
    model = DDPM.from_pretrained(tmp_path)
    assert isinstance(model.process, EDM) and model.process.sigma_data == 1
    assert model.describe() != DDPM(model.network, diffusers.EDMEulerScheduler()).describe()
    model.save_pretrained(tmp_path / "again")
    assert DDPM.from_pretrained(tmp_path / "again").describe() == model.describe()


MALFORMED = {
    "scheduler/scheduler_config.json": [
        {"num_train_timesteps": -5},
        {"num_train_timesteps": 0},
        {"beta_schedule": "cosine"},
        "[" * 100_000,
    ],
    "model_index.json": [[]],
    "unet/config.json": [[]],
}


@pytest.mark.parametrize(
    ("file", "changes"), [(file, each) for file, all in MALFORMED.items() for each in all]
)
def test_malformed_settings_of_a_checkpoint_are_refused(file, changes, ddpm_path, tmp_path):
    path = shutil.copytree(ddpm_path, tmp_path / "copy")
    if isinstance(changes, dict):
        changes = {**json.loads((path / file).read_text()), **changes}
    text = changes if isinstance(changes, str) else json.dumps(changes)
    (path / file).write_text(text)
    with pytest.raises(DminError, match=r"model\.path=|scheduler"):
        DDPM.from_pretrained(path)


def test_a_continuous_ladder_takes_all_between_its_ends():
    timesteps = process_of(diffusers.EDMEulerScheduler()).timesteps
    assert 0.123 in timesteps and timesteps[0] in timesteps and timesteps[-1] in timesteps
    assert 1.2 not in timesteps and -2 not in timesteps
    flow = process_of(diffusers.FlowMatchEulerDiscreteScheduler()).timesteps
    assert 0.5 in flow and 0 not in flow and 1001 not in flow
