"""What latent models took images for on the way, against x0 worked out from the network's calls."""

import diffusers
import numpy as np
import pytest
import torch
from models.families import EVERY, FAMILIES, LATER, load

from dmin.attribution import TRAK, FeatureSet, JourneyTRAK, retrieve, score_matrix
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Example, Examples
from dmin.data.image_folder import ImageFolder
from dmin.diffusion.processes import RectifiedFlow
from dmin.diffusion.timesteps import Stratified
from dmin.queries import Generated
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic

STEPS, STATES = 5, 3
SCHEDULERS = [
    "DDIM",
    "PNDM",
    "EulerDiscrete",
    "DPMSolverMultistep",
    "UniPCMultistep",
    "HeunDiscrete",
]


def by_hand(model, run):
    """Return the decoded x0 of each call of the network; one call a step, without guidance."""
    calls, pipeline = [], model.pipeline

    def record(network, args, kwargs, output):
        noised = args[0] if args else kwargs["hidden_states"]
        calls.append((noised, output[0] if isinstance(output, tuple) else output.sample))

    handle = model.network.register_forward_hook(record, with_kwargs=True)
    run()
    handle.remove()
    images, config = [], pipeline.vae.config
    for step, ((x, output), t) in enumerate(zip(calls, pipeline.scheduler.timesteps, strict=True)):
        if isinstance(model.process, RectifiedFlow):
            clean = x - pipeline.scheduler.sigmas[step] * output
        else:
            alpha = pipeline.scheduler.alphas_cumprod[int(t)]
            output = output[:, : x.shape[1]]
            if pipeline.scheduler.config.prediction_type == "v_prediction":
                clean = alpha.sqrt() * x - (1 - alpha).sqrt() * output
            else:
                clean = (x - (1 - alpha).sqrt() * output) / alpha.sqrt()
        if type(pipeline).__name__ == "FluxPipeline":
            clean = pipeline._unpack_latents(clean, 16, 16, 2)
        with torch.no_grad():
            z = clean / config["scaling_factor"] + (config.get("shift_factor") or 0)
            images.append((pipeline.vae.decode(z).sample / 2 + 0.5).clamp(0, 1))
    return torch.stack(images)


@pytest.mark.parametrize("name", [*(n for n in FAMILIES if n not in LATER), *SCHEDULERS])
def test_estimates_are_those_that_the_networks_calls_mean(name, monkeypatch):
    family = name if name in FAMILIES else "stable_diffusion"
    settings = {"embedded_guidance": 1.0} if name == "flux" else {}
    model = load(family, guidance_scale=1.0, **settings)
    pipeline = model.pipeline
    if name in SCHEDULERS:
        scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipeline.scheduler.config)
        monkeypatch.setattr(pipeline, "scheduler", scheduler)
    if not isinstance(
        model.process, RectifiedFlow
    ):  # estimates of an unthinking network are enormous
        monkeypatch.setattr(pipeline.scheduler.config, "clip_sample", False, raising=False)
    asked = list(FAMILIES[family].prompts[:2]), [7, 8], STEPS
    expected = by_hand(model, lambda: model.sample(*asked))
    found = model.trajectory(*asked, STATES)
    total = len(expected)
    chosen = sorted(total - 1 - number * total // STATES for number in range(STATES))
    torch.testing.assert_close(found, expected[chosen], atol=2e-3, rtol=0)
    assert "step" not in vars(pipeline.scheduler)  # as it was


ALONE = [name for name in LATER if not EVERY[name].model.given_images]


@pytest.mark.parametrize("name", ["stable_diffusion_3", "dit", "pixart", *ALONE])
def test_guided_generation_is_recorded_too_and_ends_at_the_image(name):
    model = load(name, guidance_scale=3.0)
    asked = list(EVERY[name].prompts[:2]), [7, 8], STEPS
    found = model.trajectory(*asked, STATES)
    assert found.shape == (STATES, *model.sample(*asked).shape)
    if isinstance(model.process, RectifiedFlow):
        torch.testing.assert_close(found[-1], model.sample(*asked), atol=1e-4, rtol=0)


def test_what_cannot_be_recorded_is_refused(monkeypatch):
    model = load("stable_diffusion")
    with pytest.raises(DminError, match=r"queries\.trajectory=9: this generation has 2 steps"):
        model.trajectory(["cat"], [1], 2, 9)
    assert "step" not in vars(model.pipeline.scheduler)

    class Silent(diffusers.DDIMScheduler):
        def step(self, *args, **settings):
            found = super().step(*args, **settings)
            found.pred_original_sample = None
            self.sigmas, self.step_index = torch.ones(9), 1
            return found

    silent = Silent.from_config(model.pipeline.scheduler.config)
    monkeypatch.setattr(model.pipeline, "scheduler", silent)
    with pytest.raises(DminError, match="Silent does not report"):
        model.trajectory(["cat"], [1], 2, 1)


def test_journey_trak_of_a_latent_model(tmp_path):
    model = load("stable_diffusion")
    source = Generated(prompts=["a red cat", "dog"], steps=4, trajectory=2)
    source.generate(model, tmp_path / "images")
    asked = ImageFolder(tmp_path / "images")
    states = [ImageFolder(folder) for folder in source.states(tmp_path / "images")]
    collector = GradientCollector(model, BlockCyclic(256), Stratified(2))

    def side(dataset, name):
        trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
        return FeatureSet(collector.collect(dataset, tmp_path / name, trainer=trainer), dataset)

    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    train = side(Examples([Example(f"x{i}", x, caption="cat") for i, x in enumerate(images)]), "x")
    each = [side(state, f"state {number}") for number, state in enumerate(states)]
    queries = FeatureSet(side(asked, "q").store, trajectory=each)
    expected = np.mean([score_matrix(state, train, TRAK()) for state in each], 0)
    found = score_matrix(queries, train, JourneyTRAK())
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert len(retrieve(queries, train, JourneyTRAK(), k=3).train_ids) == 2
