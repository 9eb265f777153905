"""What the network is told in attribution is what the pipeline tells it in sampling."""

import inspect

import pytest
import torch
from models.families import EVERY, FAMILIES, checkpoint, load, sample

from dmin.data import Example, collate
from dmin.data.base import Sizes
from dmin.data.image_folder import ImageFolder
from dmin.models.oracle import example_given
from dmin.queries import Generated
from dmin.runtime.errors import DminError


def test_pixart_of_1024_pixels_is_told_size_and_shape():
    model = FAMILIES["pixart"].model.from_pretrained(checkpoint("pixart", sample_size=128))
    sizes = model._sizes({"image": torch.zeros(2, 3, 32, 16)})
    assert sizes["resolution"].tolist() == [[32, 16]] * 2
    assert sizes["aspect_ratio"].tolist() == [[2.0]] * 2
    noised, t = torch.randn(2, 4, 16, 8), torch.tensor([5, 500])
    condition = {**model.condition(["cat", "dog"]), **sizes}
    shown = {**condition, "aspect_ratio": condition["aspect_ratio"] / 2}
    with torch.no_grad():
        assert not torch.allclose(
            model._predict(noised, t, condition), model._predict(noised, t, shown)
        )


def sized(height, width, *examples):
    """A batch of black images, each with (sizes, metadata)."""
    examples = examples or [(None, {})]
    image = torch.zeros(3, height, width)
    return collate(
        [
            Example(f"e{i}", image, caption="cat", metadata=metadata, sizes=sizes)
            for i, (sizes, metadata) in enumerate(examples)
        ]
    )


TOLD = {  # how each family orders original height and width, top, left, target height and width
    "stable_diffusion_xl": ("time_ids", [0, 1, 2, 3, 4, 5]),
    "hunyuan_dit": ("image_meta_size", [0, 1, 4, 5, 2, 3]),
}


@pytest.mark.parametrize("name", TOLD)
def test_sizes_told_are_those_of_each_image_or_a_setting(name):
    key, order = TOLD[name]

    def rows(model, *examples):
        found = model._sizes(sized(32, 48, *examples))[key].tolist()
        return [[row[order.index(i)] for i in range(6)] for row in found]

    file = (Sizes((480, 640), (0, 8)), {}), (None, {})
    assert rows(load(name), *file) == [[480, 640, 0, 8, 32, 48], [32, 48, 0, 0, 32, 48]]
    fixed = load(name, original_size=(64, 96), crop=(1, 2), target_size=(8, 16))
    assert rows(fixed, *file) == [[64, 96, 1, 2, 8, 16]] * 2
    cut = load(name, sizes_from="cut")
    assert rows(cut, *file) == [[32, 48, 0, 0, 32, 48]] * 2
    said = load(name, sizes_from="metadata")
    columns = {"original_height": 9, "original_width": 8, "crop_top": 7, "crop_left": 6}
    assert rows(said, (file[0][0], columns)) == [[9, 8, 7, 6, 32, 48]]
    with pytest.raises(DminError, match=r"'e0' has original_height, original_width = \[None"):
        rows(said, *file)
    assert len({str(m.describe()) for m in (load(name), fixed, said)}) == 3
    with pytest.raises(DminError, match=r"model\.sizes_from='file'"):
        load(name, sizes_from="file")


@pytest.mark.parametrize("name", TOLD)
def test_generated_images_know_the_sizes_that_the_sampler_was_told(name, tmp_path):
    model = load(name, sizes_from="metadata", original_size=(64, 96))
    Generated(["cat"], steps=1).generate(model, tmp_path / "q")
    batch = collate([ImageFolder(tmp_path / "q")[0]])
    key, order = TOLD[name]
    (row,) = load(name, sizes_from="metadata")._sizes(batch)[key].tolist()
    size = FAMILIES[name].size
    assert [row[order.index(i)] for i in range(6)] == [64, 96, 0, 0, size, size]


def no_prompt(model):
    """The condition of no prompt; where it is told with an image, with that of the sampler."""
    if model.family != "qwen_image_edit":
        return model._no_prompt()
    batch = {**example_given(model), "id": ["a"]}
    return load(model.family, prompt_dropout=1.0)._prompted(batch)


# They are guided by an input of their own.
@pytest.mark.parametrize("name", [name for name in sorted(EVERY) if "flux" not in name])
def test_no_prompt_is_what_guided_sampling_steps_away_from(name):
    """The conditions of the unguided half of the pipeline's own batch, or of its second call."""
    calls, model = [], load(name, guidance_scale=5.0)
    network = next(iter(model.networks.values()))
    handle = network.register_forward_pre_hook(
        lambda network, args, kwargs: calls.append(
            dict(zip(names, args, strict=False)) | kwargs  # by the names of its forward
        ),
        with_kwargs=True,
    )
    names = list(inspect.signature(network.forward).parameters)
    sample(model, [EVERY[name].prompts[0]], [7], 2)
    handle.remove()
    at_once = len(calls[0][names[0]]) > 1
    told = calls[0 if at_once else 1]
    told = {**told, **(told.get("added_cond_kwargs") or {})}
    # Of the two halves, the pipelines of these have the unguided one last.
    last = name in ("dit", "z_image") or name.startswith("instruct")
    half = slice(1, 2) if at_once and last else slice(0, 1)
    condition = no_prompt(model)
    if "qwen" in name or name == "z_image":  # which the pipelines pad otherwise, or not at all
        (text, value), (_, mask) = condition.items()
        assert bool(mask.all() or not value[~mask].any())
        condition = {text: value[mask][None]}
    if name == "chroma":
        condition = {"encoder_hidden_states": condition["encoder_hidden_states"]}
    for key, value in condition.items():
        given = told[key][half]
        given = given[0][None] if isinstance(given, list) else given
        torch.testing.assert_close(given.to(value.dtype), value, atol=1e-5, rtol=1e-4)
