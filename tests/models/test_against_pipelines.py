"""What the network is told in attribution is what the pipeline tells it in sampling."""

import pytest
import torch
from models.families import FAMILIES, checkpoint, load


@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_are_those_of_the_pipeline(name):
    family = FAMILIES[name]
    settings = {"embedded_guidance": 1.0} if name == "flux" else {}
    model = load(name, guidance_scale=1.0, **settings)  # one call of the network a step
    calls = []

    def record(network, args, kwargs, output):
        noised = args[0] if args else kwargs["hidden_states"]
        calls.append((noised, output[0] if isinstance(output, tuple) else output.sample))

    handle = model.network.register_forward_hook(record, with_kwargs=True)
    prompt = family.prompts[0]
    model.sample([prompt], [7], 2)
    handle.remove()
    image = torch.zeros(1, 3, family.size, family.size)
    condition = {**model.condition([prompt]), **model._sizes(image)}
    for (noised, output), t in zip(calls, model.pipeline.scheduler.timesteps, strict=True):
        if name == "flux":
            height = 2 * family.latent[1]
            noised, output = (
                model.pipeline._unpack_latents(x, height, height, 2) for x in (noised, output)
            )
        with torch.no_grad():
            found = model._predict(noised, t[None], condition)
        torch.testing.assert_close(found, output, atol=1e-5, rtol=1e-4)


def test_pixart_of_1024_pixels_is_told_size_and_shape():
    model = FAMILIES["pixart"].model.from_pretrained(checkpoint("pixart", sample_size=128))
    sizes = model._sizes(torch.zeros(2, 3, 32, 16))
    assert sizes["resolution"].tolist() == [[32, 16]] * 2
    assert sizes["aspect_ratio"].tolist() == [[2.0]] * 2
    noised, t = torch.randn(2, 4, 16, 8), torch.tensor([5, 500])
    condition = {**model.condition(["cat", "dog"]), **sizes}
    shown = {**condition, "aspect_ratio": condition["aspect_ratio"] / 2}
    with torch.no_grad():
        assert not torch.allclose(
            model._predict(noised, t, condition), model._predict(noised, t, shown)
        )


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "hunyuan_dit"])
def test_sizes_told_are_settings_with_defaults_from_the_image(name):
    image = torch.zeros(2, 3, 32, 48)
    key, order = {
        "stable_diffusion_xl": ("time_ids", [0, 1, 2, 3, 4, 5]),
        "hunyuan_dit": ("image_meta_size", [0, 1, 4, 5, 2, 3]),
    }[name]
    default = load(name)._sizes(image)[key]
    assert default.tolist()[0] == [[32, 48, 0, 0, 32, 48][i] for i in order]
    told = load(name, original_size=(64, 96), crop=(1, 2), target_size=(8, 16))
    assert told._sizes(image)[key].tolist()[1] == [[64, 96, 1, 2, 8, 16][i] for i in order]
    assert told.describe() != load(name).describe()
