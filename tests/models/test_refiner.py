"""SDXL's refiner: told a score that data need not have, trained at little noise, given images."""

import json
import shutil
import warnings

import diffusers
import pytest
import torch
import transformers
from models import original_layout as original
from models.families import EVERY, checkpoint, load, sample
from models.test_against_pipelines import sized
from models.tiny import clip, stable_diffusion_xl_refiner

import dmin
from dmin.collect import GradientCollector
from dmin.data import Example, collate
from dmin.data.base import Sizes
from dmin.diffusion.timesteps import Explicit, Stratified
from dmin.models.base import per_example_loss
from dmin.models.families.stable_diffusion_xl import StableDiffusionXL, StableDiffusionXLRefiner
from dmin.models.oracle import sampling_error
from dmin.models.recognition import recognise
from dmin.runtime.errors import DminError, DminWarning
from dmin.sketches import BlockCyclic

NAME = "stable_diffusion_xl_refiner"
ENCODER = ("CLIPTextModel", "CLIPTokenizer")


def refiner(**settings):
    """The tiny refiner with nothing said of it but these."""
    return StableDiffusionXLRefiner(load(NAME).pipeline, **settings)


def flagged(folder, name, value):
    shutil.copytree(checkpoint(name), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **value}))
    return folder


def test_it_is_known_by_its_flag_and_the_base_stays_what_it_was(tmp_path):
    img2img = "StableDiffusionXLImg2ImgPipeline"
    base = flagged(tmp_path / "base", "stable_diffusion_xl", {"_class_name": img2img})
    assert recognise(base).family == "stable_diffusion_xl"
    assert StableDiffusionXL.from_pretrained(base).describe() == (
        load("stable_diffusion_xl").describe()
    )
    found = recognise(checkpoint(NAME))
    assert found.family == NAME and "with requires_aesthetics_score" in found.evidence
    with pytest.raises(DminError, match=r"with requires_aesthetics_score, .* model=.*_refiner"):
        StableDiffusionXL.from_pretrained(checkpoint(NAME))
    with pytest.raises(DminError, match=r"Choose model=stable_diffusion_xl,"):
        StableDiffusionXLRefiner.from_pretrained(checkpoint("stable_diffusion_xl"))
    other = flagged(tmp_path / "x", NAME, {"_class_name": "StableDiffusionXLInpaintPipeline"})
    with pytest.raises(DminError, match=r"with requires_aesthetics_score.*also takes a mask"):
        recognise(other)


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        (
            NAME,
            False,
            r"takes 56 additional numbers, but 6 .* make 64\. Set requires_aesthetics_score",
        ),
        (
            "stable_diffusion_xl",
            True,
            r"takes 64 additional numbers, but 5 .* make 56\. Set requires",
        ),
    ],
)
def test_a_flag_that_is_not_that_of_the_network_is_refused(name, flag, message, tmp_path):
    told = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "requires_aesthetics_score": flag,
    }
    parts = ("text_encoder", "tokenizer")
    told |= {n: ["transformers", kind] for n, kind in zip(parts, ENCODER, strict=True)}
    folder = flagged(tmp_path / "x", name, told)
    for part in parts:
        base = checkpoint("stable_diffusion_xl") / part
        shutil.copytree(base, folder / part, dirs_exist_ok=True)
    with pytest.raises(DminError, match=message):
        dmin.models.auto(folder)


def test_what_is_assumed_is_said_until_it_is_stated():
    with pytest.warns(DminWarning, match=r"score 6, .*model\.score_column.*low 200.*, or 1000 for"):
        assumed = refiner()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DminWarning)
        stated = refiner(aesthetic_score=6, trained_below=200)
        refiner(score_column="aesthetic", trained_below=200)
    assert assumed.describe() == stated.describe()
    assert list(assumed.timesteps) == list(stated.timesteps) == list(range(199, -1, -1))
    with pytest.warns(DminWarning) as told:
        refiner(score_column="aesthetic")
    assert "score" not in str(told[0].message).partition(":")[2]


def test_timesteps_are_those_that_it_was_trained_at():
    model = refiner(aesthetic_score=6, trained_below=200)
    collector = GradientCollector(model, BlockCyclic(256), Stratified(10))
    assert list(collector.timesteps) == [189, 169, 149, 129, 109, 89, 69, 49, 29, 9]
    with pytest.raises(DminError, match=r"has \[700\].* from 0 to 199"):
        GradientCollector(model, BlockCyclic(256), Explicit([700]))
    assert len(load(NAME).timesteps) == 1000  # trained_below=1000
    with pytest.raises(DminError, match=r"trained_below=0: give a timestep, 1 or more"):
        refiner(trained_below=0)


def test_it_is_told_sizes_and_a_score_of_each_image():
    file = Sizes((480, 640), (0, 8))
    batch = sized(32, 48, (file, {"beauty": 7.5}), (file, {"beauty": 5}), (file, {}))

    def scores(**settings):
        rows = refiner(trained_below=200, **settings)._sizes(batch)["time_ids"].tolist()
        assert all(row[:4] == [480, 640, 0, 8] for row in rows)
        return [row[4] for row in rows]

    assert scores(aesthetic_score=5.5) == [5.5] * 3
    assert scores(score_column="beauty", aesthetic_score=4) == [7.5, 5.0, 4.0]
    with pytest.raises(DminError, match=r"'e2' has beauty = None .* model\.aesthetic_score=NUMBER"):
        scores(score_column="beauty")
    batch["metadata"][2]["beauty"] = float("nan")
    with pytest.raises(DminError, match="'e2' has beauty = nan"):
        scores(score_column="beauty", aesthetic_score=4)
    with pytest.raises(DminError, match=r"target_size=\[8, 8\]: a refiner takes none"):
        refiner(target_size=[8, 8])
    with pytest.raises(DminError, match=r"aesthetic_score=nan: give a number"):
        refiner(aesthetic_score=float("nan"))
    pipeline = stable_diffusion_xl_refiner()
    pipeline.register_modules(text_encoder=clip(), tokenizer=pipeline.tokenizer_2)
    with pytest.raises(DminError, match=r"has a text_encoder, .* to \[null, null\]"):
        dmin.from_pipeline(pipeline)
    settings = ({}, {"aesthetic_score": 5}, {"score_column": "a"}, {"score_column": "b"})
    settings += ({"score_column": "a", "aesthetic_score": 5},)
    models = [refiner(trained_below=200, **told) for told in settings]
    assert len({str(model.describe()) for model in models}) == len(models)
    assert list(models[2].metadata_columns) == ["a"] and not models[0].metadata_columns
    both = refiner(sizes_from="metadata", score_column="a", trained_below=200)
    assert [*both.metadata_columns][-1] == "a" and len(both.metadata_columns) == 5


def test_its_loss_is_that_of_its_parts():
    """By hand: OpenCLIP's last layer but one and pooled text, sizes and score, noise predicted."""
    model = load(NAME)
    parts, image = model.pipeline, torch.rand(1, 3, 16, 16)
    x0, condition = model.encode(collate([Example("a", image[0], caption="a red cat")]))
    noise, t = torch.randn_like(x0), torch.tensor([150])
    with torch.no_grad():
        found = per_example_loss(model.predict(x0, noise, t, condition))
        ids = parts.tokenizer_2(
            ["a red cat"], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        text = parts.text_encoder_2(ids, output_hidden_states=True)
        latents = parts.vae.config.scaling_factor * (
            parts.vae.encode(2 * image - 1).latent_dist.mode()
        )
        alpha = parts.scheduler.alphas_cumprod[150]
        told = {
            "text_embeds": text.text_embeds,
            "time_ids": torch.tensor([[16.0, 16.0, 0.0, 0.0, 6.0]]),
        }
        noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        output = parts.unet(noised, t, text.hidden_states[-2], added_cond_kwargs=told).sample
    torch.testing.assert_close(found, (output - noise).square().mean()[None])


def test_guided_queries_step_away_from_what_the_sampler_does():
    calls = []
    model = load(NAME, guidance_scale=5.0, query_guidance=5.0).for_queries()
    handle = model.network.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    sample(model, ["a red cat"], [7], 1)
    handle.remove()
    _, condition = model.encode(sized(16, 16))
    other, own = calls[0]["time_ids"]
    torch.testing.assert_close(condition["time_ids"][0], own)
    torch.testing.assert_close(condition["dropped.time_ids"][0], other)
    assert own[4] == 6 and other[4] == 2.5
    # Training drops captions, not scores.
    _, condition = load(NAME, prompt_dropout=0.1).encode(sized(16, 16))
    assert "dropped.time_ids" not in condition


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_all_steps_that_are_asked_for_are_taken(steps, monkeypatch):
    model, taken = load(NAME), []
    step = model.pipeline.scheduler.step
    monkeypatch.setattr(
        model.pipeline.scheduler,
        "step",
        lambda output, t, *args, **told: taken.append(int(t)) or step(output, t, *args, **told),
    )
    sample(model, ["cat"], [1], steps)
    assert len(taken) == steps and max(taken) <= 300


def test_its_text_encoder_may_be_trained_with_it():
    model = refiner(aesthetic_score=6, trained_below=200, text_encoders="trained")
    frozen = load(NAME)
    x0, condition = model.encode(sized(16, 16))
    noise, t = torch.randn_like(x0), torch.tensor([100])
    _, encoded = frozen.encode(sized(16, 16))
    with torch.no_grad():
        found, expected = (
            each.predict(x0, noise, t, c).prediction
            for each, c in ((model, condition), (frozen, encoded))
        )
    torch.testing.assert_close(found, expected)
    assert sampling_error(model) <= 0.06


def test_one_file_has_the_text_encoder_that_it_was_published_with(tmp_path):
    torch.manual_seed(1)
    pipeline = stable_diffusion_xl_refiner()
    pipeline.text_encoder_2 = clip(transformers.CLIPTextModelWithProjection, hidden_size=24)
    pipeline.save_pretrained(str(tmp_path / "path"))
    encoder = original.open_clip_weights(pipeline.text_encoder_2, "conditioner.embedders.0.model.")
    parts = {**original.unet_weights(pipeline.unet), **original.vae_weights(pipeline.vae)}
    file = original.save({**parts, **encoder}, tmp_path / "x.safetensors")
    # Of the checkpoint only configs are left.
    for left in (tmp_path / "path").glob("*/*.safetensors"):
        left.unlink()
    assert recognise(tmp_path / "path", single_file=file).family == NAME
    model = StableDiffusionXLRefiner.from_pretrained(tmp_path / "path", single_file=file)
    for name, part in {**model.encoders, "unet": model.network}.items():
        for key, weight in getattr(pipeline, name).state_dict().items():
            torch.testing.assert_close(part.state_dict()[key], weight, msg=f"{name} {key}")
    with pytest.raises(DminError, match=rf"of the family {NAME} .* of stable_diffusion_xl\. "):
        recognise(checkpoint("stable_diffusion_xl"), single_file=file)


def test_a_pipeline_in_hand_is_the_model_that_its_folder_is():
    pipeline = diffusers.DiffusionPipeline.from_pretrained(checkpoint(NAME))
    model = dmin.from_pipeline(pipeline, **EVERY[NAME].settings)
    assert type(model) is StableDiffusionXLRefiner and model.describe() == load(NAME).describe()
    assert sample(model, ["cat"], [1], 2).shape == (1, 3, 16, 16)
