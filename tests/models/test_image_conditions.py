"""Models that are given an image with each example: what they are given, refused, and found."""

import shutil

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from models.families import EVERY, PAIRS, checkpoint, load
from models.test_families import examples
from PIL import Image

from dmin.attribution.retrieval import retrieve
from dmin.cli import main
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Example, Examples, collate
from dmin.diffusion.timesteps import Explicit
from dmin.models import vae
from dmin.models.families.image_conditions import drawn_mask
from dmin.models.families.qwen_image import AREA
from dmin.models.recognition import of_pipeline, recognise
from dmin.queries import Planted
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic


def batch(name, n=2):
    return collate(examples(EVERY[name], n).examples)


@pytest.mark.parametrize("name", PAIRS)
def test_a_checkpoint_is_recognised_by_its_pipeline(name):
    assert recognise(checkpoint(name)).family == name


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_given_changes_the_prediction(name):
    model, shown = load(name), batch(name)
    x0, condition = model.encode(shown)
    _, other = model.encode({**shown, "condition_image": shown["condition_image"].flip(-1)})
    noise, t = torch.ones_like(x0), torch.tensor([700, 20])
    with torch.no_grad():
        found, changed = (model.predict(x0, noise, t, c).prediction for c in (condition, other))
    assert (found - changed).flatten(1).abs().amax(1).min() > 1e-4


def test_channels_are_those_that_the_published_networks_have():
    mask = torch.zeros(1, 3, 16, 16)
    mask[..., 8:, :] = 0.6
    image = torch.rand(1, 3, 16, 16)
    model, told = load("stable_diffusion_inpaint"), {"id": ["a"], "caption": ["cat"]}
    shown = {"image": image, "condition_image": mask, **told}
    given = model.encode(shown)[1]["beside"]
    assert given[0, 0, :4].eq(0).all() and given[0, 0, 4:].eq(1).all()
    left = torch.where(mask >= 0.5, torch.tensor(0.5), image)
    torch.testing.assert_close(given[:, 1:], vae.encode(model.pipeline.vae, left, shifted=False))
    # Of an image to change, the autoencoder's own latents.
    model = load("instruct_pix2pix")
    mode = model.pipeline.vae.encode(2 * mask - 1).latent_dist.mode()
    torch.testing.assert_close(model.encode(shown)[1]["beside"], mode)
    # The lowest depth is -1, the highest 1.
    depth = load("stable_diffusion_depth").encode(shown)[1]["beside"]
    assert depth.amin() == -1 and depth.amax() == 1 and depth.shape == (1, 1, 8, 8)


def test_data_without_such_images_or_with_others_are_refused():
    model, shown = load("stable_diffusion_inpaint"), batch("stable_diffusion_inpaint")
    without = {name: value for name, value in shown.items() if name != "condition_image"}
    with pytest.raises(DminError, match=r"no condition image.*data\.condition_image"):
        model.encode(without)
    with pytest.raises(DminError, match="are in colour"):
        model.encode({**shown, "condition_image": shown["image"]})
    with pytest.raises(DminError, match="Scale both to the same size"):
        model.encode({**shown, "condition_image": shown["condition_image"][..., :8]})
    with pytest.raises(
        DminError, match=r"takes no condition images\. Set data\.condition_image=null"
    ):
        load("stable_diffusion").encode(shown)
    with pytest.raises(DminError, match=r"generates from images.* queries\.condition_image"):
        model.sample(["cat"], [1], 2)
    with pytest.raises(DminError, match="is constant"):
        load("stable_diffusion_depth").encode({**shown, "condition_image": 0 * shown["image"]})


@pytest.mark.parametrize("name", ["stable_diffusion_xl_refiner", "flux_kontext"])
def test_commands_that_would_generate_refuse_before_a_weight_is_read(name, tmp_path):
    shutil.copytree(checkpoint(name), tmp_path / "m")
    for weights in (tmp_path / "m").glob("*/*.safetensors"):
        weights.unlink()
    words = ["data=digits", "queries=generated", "queries.prompts=[cat]", "trainer=cpu"]
    words += [f"model.path={tmp_path / 'm'}", f"paths.outputs={tmp_path}"]
    with pytest.raises(SystemExit) as stopped:
        main(["sample", *words])
    told = str(stopped.value)
    assert "generates from images" in told
    assert "set queries=images queries.root=FOLDER" in told
    assert ("queries.condition_image=FOLDER" in told) == (name == "flux_kontext")


def test_a_mask_is_drawn_once_for_all_images_and_is_part_of_the_fingerprint():
    model = load("stable_diffusion_inpaint", mask_seed=3)
    shown = batch("stable_diffusion_inpaint")
    del shown["condition_image"]
    given = model.encode(shown)[1]["beside"]
    assert torch.equal(given[0, 0], given[1, 0])
    assert model.describe()["mask_seed"] == 3
    assert "mask_seed" not in load("stable_diffusion_inpaint").describe()
    assert model.reads_condition_images({}) and not model.reads_condition_images({"mask_seed": 3})
    masks = torch.cat([drawn_mask(24, 16, seed) for seed in range(200)])
    assert masks.unique().tolist() == [0, 1] and masks.flatten(1).any(1).all()
    share = masks.mean((1, 2, 3))
    assert 0.15 < share.mean() < 0.35 and share.std() > 0.1  # E = (1 + π/4)/2 · 1/4 = .22


def test_an_image_to_change_may_be_left_out_of_no_example():
    one, image = torch.rand(3, 8, 8), torch.rand(3, 8, 8)
    with pytest.raises(DminError, match="all examples need a condition image of the same shape"):
        collate([Example("a", image, condition_image=one), Example("b", image)])
    with pytest.raises(DminError, match="condition image of a"):
        collate([Example("a", image, condition_image=one * 300)])


@pytest.mark.parametrize("name", ["stable_diffusion_inpaint", "flux_kontext", "qwen_image_edit"])
def test_a_planted_copy_is_found_by_the_pair(name, tmp_path):
    family, model = EVERY[name], load(name)
    prompts = family.prompts
    drawn = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    # Two and two are equal but for what they were given.
    data = Examples(
        [
            Example(f"e{i}", drawn[i // 2], caption=prompts[i // 2], condition_image=shown)
            for i, shown in enumerate(drawn.roll(1, 0)[:, :1].expand(-1, 3, -1, -1))
        ]
    )
    collector = GradientCollector(model, BlockCyclic(2048), Explicit((100,)))
    trainer = {"trainer": predict_trainer(accelerator="cpu", enable_progress_bar=False)}
    train = collector.collect(data, tmp_path / "train", block_size=4, **trainer)
    copies = Planted(count=4).plant(data)
    asked = collector.collect(copies, tmp_path / "asked", block_size=4, as_queries=True, **trainer)
    found = retrieve(asked, train, k=2)
    assert [row[0] for row in found.train_ids] == [f"e{i}" for i in range(4)]
    assert (found.scores[:, 0] > 1 - 1e-5).all() and (found.scores[:, 1] < 1 - 1e-5).all()


WIDE = {"max_sequence_length": 24, "condition_area": 32 * 64, "sample_size": (16, 32)}


def test_the_pipeline_of_qwen_image_edit_scales_shows_and_places_an_image_as_attribution_does():
    model, calls = load("qwen_image_edit", guidance_scale=1.0, **WIDE), []
    drawn = torch.randint(256, (16, 32, 3), generator=torch.Generator().manual_seed(6))
    picture = Image.fromarray(drawn.byte().numpy())
    given = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    batch = {"image": torch.rand(1, 3, 16, 32), "condition_image": given, "id": ["a"]}
    handle = model.network.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(
            kwargs | dict(zip(["hidden_states"], args, strict=False))
        ),
        with_kwargs=True,
    )
    seen = {name: batch[name] for name in ("image", "condition_image")}
    before = pipeline_qwenimage_edit.calculate_dimensions
    model.sample(["a red cat"], [1], 2, seen)
    assert pipeline_qwenimage_edit.calculate_dimensions is before
    x0, condition = model.encode({**batch, "caption": ["a red cat"]})
    model.predict(x0, torch.ones_like(x0), torch.tensor([700]), condition)
    handle.remove()
    pipeline, ours = calls[0], calls[-1]
    # Of 2 × 8 and 32 × 64 pixels, four by four a token.
    assert ours["img_shapes"] == pipeline["img_shapes"] == [[(1, 4, 8), (1, 8, 16)]]
    torch.testing.assert_close(ours["hidden_states"][:, 32:], pipeline["hidden_states"][:, 32:])
    mask = ours["encoder_hidden_states_mask"]
    told = ours["encoder_hidden_states"][mask][None]
    torch.testing.assert_close(told, pipeline["encoder_hidden_states"], atol=1e-5, rtol=1e-4)
    # By hand: Pillow's resize, the mode, the statistics.
    scaled = np.array(picture.resize((64, 32), Image.Resampling.LANCZOS)) / 127.5 - 1
    pixels = torch.from_numpy(scaled).float().permute(2, 0, 1)[None, :, None]
    config, mode = model.pipeline.vae.config, model.pipeline.vae.encode(pixels).latent_dist.mode()
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(condition["beside"], (mode[:, :, 0] - mean) / std)


def test_the_text_encoder_of_qwen_image_edit_sees_each_examples_image_with_no_prompt_too():
    shown = batch("qwen_image_edit")
    told = load("qwen_image_edit", prompt_dropout=0.1).encode(shown)[1]
    spaces = {**shown, "caption": [" "] * 2}
    alone = load("qwen_image_edit", empty_captions="keep").encode(spaces)[1]
    other = {**shown, "condition_image": shown["condition_image"].flip(0)}
    changed = load("qwen_image_edit").encode(other)[1]
    for name in ("encoder_hidden_states", "encoder_hidden_states_mask"):
        assert torch.equal(told[f"dropped.{name}"], alone[name])
    text, mask = (
        told[f"dropped.{n}"] for n in ("encoder_hidden_states", "encoder_hidden_states_mask")
    )
    assert (text[0] - text[1]).abs().max() > 1e-3 and not text[~mask].any()
    assert (changed["encoder_hidden_states"] - told["encoder_hidden_states"]).abs().max() > 1e-3


def test_what_qwen_image_edit_cannot_be_told_is_refused_and_its_area_is_recorded():
    model, shown = load("qwen_image_edit"), batch("qwen_image_edit")
    with pytest.raises(DminError, match=r"also takes the image to edit.*model\.encode\(batch\)"):
        model.condition(["a red cat"])
    with pytest.raises(DminError, match=r"max_sequence_length=12: 'a red cat' .* has 17 tokens"):
        load("qwen_image_edit", max_sequence_length=12).encode(shown)
    for area in (-1, 8):
        with pytest.raises(
            DminError, match=rf"condition_area={area}: .* the pipeline uses 1048576"
        ):
            load("qwen_image_edit", condition_area=area).encode(shown)
    with pytest.raises(DminError, match=r"EditPlusPipeline.*sees several images"):
        of_pipeline("QwenImageEditPlusPipeline", "m")
    plain = load("qwen_image_edit", condition_area=AREA)
    assert plain.describe()["condition_area"] == 1024**2 != model.describe()["condition_area"]
    assert [each.size for each in plain._scaled(shown)] == [(1024, 1024)] * 2
