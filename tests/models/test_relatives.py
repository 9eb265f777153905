"""Checkpoints that are nearly a family's: distinguished by their JSON files, before any weight."""

import inspect
import json
import shutil

import diffusers
import pytest
import torch
from models.families import FAMILIES as TESTED, checkpoint, load, shown
from models.tiny import pixart, stable_diffusion_xl, t5, t5_tokenizer
from toy_ddpm import TINY_UNET

from dmin.data import Example, collate
from dmin.models.base import per_example_loss
from dmin.models.families.ddpm import DDPM
from dmin.models.families.pixart import PixArt
from dmin.models.families.stable_diffusion_xl import StableDiffusionXL
from dmin.models.recognition import pipelines_of_diffusers
from dmin.models.relatives import (
    MORE_INPUTS,
    all_families,
    check_inputs,
    check_pipeline,
    pipeline_kind,
)
from dmin.runtime.errors import DminError

PIPELINES = pipelines_of_diffusers()
CLAIMS = {name: of.claims for name, of in all_families().items()}
FAMILIES = {n: of for n, of in CLAIMS.items() if n in {*TESTED, "ddpm"}}
LOADED = {name: TESTED[name].model for name in TESTED} | {"ddpm": DDPM}


@pytest.fixture(scope="module")
def bare(tmp_path_factory, ddpm_path):
    """Folders of all families without a single weight."""
    folders = {}
    for name in LOADED:
        folders[name] = tmp_path_factory.mktemp(name)
        source = ddpm_path if name == "ddpm" else checkpoint(name)
        shutil.copytree(
            source,
            folders[name],
            ignore=shutil.ignore_patterns("*.safetensors"),
            dirs_exist_ok=True,
        )
    return folders


def changed(file, **changes):
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, **changes}))
    return found


@pytest.fixture
def copy(bare, tmp_path):
    def made(name):
        shutil.copytree(bare[name], tmp_path / name, dirs_exist_ok=True)
        return tmp_path / name

    return made


def test_every_pipeline_of_diffusers_is_of_one_family_or_refused():
    assert len(PIPELINES) > 100
    for held in PIPELINES:
        fits = []
        for family in CLAIMS:
            try:
                check_pipeline(held, family, "model.path=x")
                fits.append(family)
            except DminError as error:
                first = CLAIMS[family].pipelines[0]
                assert f"model.path=x: a {held}, but model={family} needs a {first}" in str(error)
                of = [f for f, known in CLAIMS.items() if held in known.pipelines + known.own]
                assert (f"Choose model={of[0]}" if of else "Give the text- or class-") in str(error)
        assert len(fits) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_is_compared_before_any_weight_is_read(family, copy):
    folder = copy(family)
    for held in [*PIPELINES, "MyPipeline", ["my_file", "MyPipeline"]]:
        index = changed(folder / "model_index.json", _class_name=held)
        kind = pipeline_kind({**index, "_class_name": held})
        if kind in FAMILIES[family].pipelines + FAMILIES[family].own:
            continue
        said = rf"a {kind}, bu"
        with pytest.raises(DminError, match=said):
            LOADED[family].from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "component", "message"),
    [
        ("controlnet", "ControlNetModel", "a controlnet .ControlNetModel., which .* does not use"),
        ("vae", "VQModel", "its vae is a VQModel|has a vae"),
        ("unet", "UNet1DModel", "its unet is a UNet1DModel|has a unet"),
        ("transformer", "AllegroTransformer3DModel", "its transformer is a|has a transformer"),
    ],
)
def test_components_are_compared_too(family, name, component, message, copy):
    folder = copy(family)
    changed(folder / "model_index.json", **{name: ["diffusers", component]})
    with pytest.raises(DminError, match=message):
        LOADED[family].from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_cannot_do_without_is_refused_before_any_weight_is_read(family, copy):
    folder = copy(family)
    index = json.loads((folder / "model_index.json").read_text())
    texts = ("text_encoder", "tokenizer")
    for name in [
        n for n, v in index.items() if n.startswith(("vae", "scheduler", *texts)) and v[0]
    ]:
        if name in FAMILIES[family].without:
            continue
        said = rf"has no {name}, which model={family} needs"
        changed(folder / "model_index.json", **{name: [None, None]})
        with pytest.raises(DminError, match=said):
            LOADED[family].from_pretrained(folder)
        changed(folder / "model_index.json", **index)
        if name.startswith(texts):
            (folder / name).rename(folder / "away")
            with pytest.raises(DminError, match=said):
                LOADED[family].from_pretrained(folder)
            (folder / "away").rename(folder / name)


@pytest.mark.parametrize("setting", MORE_INPUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_network_is_told_beyond_the_family_is_refused(family, setting, copy):
    folder, told = copy(family), "text_image" if "type" in setting else 8
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    if setting in FAMILIES[family].takes and setting != "addition_embed_type":
        return
    changed(folder / part / "config.json", **{setting: told})
    with pytest.raises(DminError, match=rf"has inputs that model=.*{setting}={told}"):
        LOADED[family].from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_are_counted_before_any_weight_is_read(family, copy):
    folder = copy(family)
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    config = changed(folder / part / "config.json", in_channels=11)
    if family == "ddpm":  # which has no latents to count: of 11, one comes out
        message = "returns 1 channels for 11"
    else:
        message = f"11 channels for {config['in_channels']}"
    with pytest.raises(DminError, match=message):
        LOADED[family].from_pretrained(folder)
    changed(folder / part / "config.json", in_channels=config["in_channels"], out_channels=7)
    with pytest.raises(DminError, match="returns 7 channels"):
        LOADED[family].from_pretrained(folder)


# What no network needs of its own: a second network's help, masks of tokens, forms of the answer.
OPTIONAL = {
    *("return_dict", "attention_mask", "encoder_attention_mask", "skip_layers"),
    *("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"),
    *("down_block_additional_residuals", "mid_block_additional_residual"),
    *("down_intrablock_additional_residuals", "controlnet_block_samples"),
    *("controlnet_single_block_samples", "controlnet_blocks_repeat"),
    "block_controlnet_hidden_states",
    # Of images to change, which no family here has; the sizes of patches have one value.
    *("kv_cache", "kv_cache_mode", "num_ref_tokens", "ref_fixed_timestep", "image_noise_mask"),
    *("patch_size", "f_patch_size"),
}
# Asked for by a setting of MORE_INPUTS, where the family does not give them.
BY_SETTING = {"class_labels", "timestep_cond", "added_cond_kwargs", "guidance"}
BY_SETTING |= {"additional_t_cond", "siglip_feats", "encoder_hidden_states_image"}


@pytest.mark.parametrize("family", TESTED)
def test_everything_that_a_network_takes_in_is_accounted_for(family, monkeypatch):
    model, seen = load(family), set()
    takes = set(inspect.signature(type(model.network).forward).parameters) - {"self"}
    positional = list(inspect.signature(type(model.network).forward).parameters)[1:]

    def seeing(network, args, kwargs):
        seen.update(positional[: len(args)], kwargs)

    handle = model.network.register_forward_pre_hook(seeing, with_kwargs=True)
    image = torch.rand(1, *TESTED[family].shape)
    x0, condition = model.encode(
        collate([Example("a", image[0], label=1, caption="cat", **shown(model, image[0]))])
    )
    model.predict(x0, torch.randn_like(x0), torch.tensor([20]), condition)
    handle.remove()
    assert takes <= seen | OPTIONAL | BY_SETTING
    assert seen <= takes


def test_an_argument_that_is_required_and_not_given_is_refused():
    class Own(diffusers.UNet2DModel):
        def forward(self, sample, timestep, style, class_labels=None):
            return super().forward(sample, timestep, class_labels)

    with pytest.raises(DminError, match="the argument style"):
        DDPM(Own(**TINY_UNET), diffusers.DDPMScheduler())
    check_inputs("ddpm", diffusers.UNet2DModel, TINY_UNET, None)


def test_pipelines_in_hand_are_held_to_the_same():
    xl = stable_diffusion_xl()
    with pytest.raises(
        DminError, match=r"a StableDiffusionXLPipeline, .* model=stable_diffusion_xl"
    ):
        TESTED["stable_diffusion"].model(xl)
    parts = {k: v for k, v in xl.components.items() if k not in ("image_encoder",)}
    with pytest.raises(DminError, match="a StableDiffusionXLInpaintPipeline"):
        StableDiffusionXL(diffusers.StableDiffusionXLInpaintPipeline(**parts))

    for name in ("text_encoder", "tokenizer_2"):
        lacking = diffusers.StableDiffusionXLPipeline(**{**parts, name: None})
        with pytest.raises(DminError, match=rf"the pipeline has no {name}, which model=stable"):
            StableDiffusionXL(lacking)

    class Own(diffusers.StableDiffusionXLPipeline):
        pass

    StableDiffusionXL(Own(**parts, add_watermarker=False))


def test_relatives_of_the_same_network_are_loaded(tmp_path, ddpm):
    xl = stable_diffusion_xl()
    parts = {k: v for k, v in xl.components.items() if k != "image_encoder"}
    diffusers.StableDiffusionXLImg2ImgPipeline(**parts).save_pretrained(str(tmp_path / "xl"))
    StableDiffusionXL.from_pretrained(tmp_path / "xl")
    scheduler = diffusers.DDIMScheduler.from_config(ddpm.scheduler.config)
    diffusers.DDIMPipeline(ddpm.network, scheduler).save_pretrained(str(tmp_path / "ddim"))
    assert DDPM.from_pretrained(tmp_path / "ddim").describe() == ddpm.describe()


def test_pixart_sigma_is_told_longer_captions(tmp_path):
    parts = pixart().components
    parts.update(text_encoder=t5(), tokenizer=t5_tokenizer())
    diffusers.PixArtSigmaPipeline(**parts).save_pretrained(str(tmp_path))
    model = PixArt.from_pretrained(tmp_path)
    assert type(model.pipeline).__name__ == "PixArtSigmaPipeline"
    assert model.condition(["a"])["encoder_hidden_states"].shape[1] == 300
    assert model.sample(["a cat"], [1], 2).shape == (1, 3, 16, 16)
    assert load("pixart").max_sequence_length == 12


def denoiser(**changes):
    network = diffusers.UNet2DModel(**{**TINY_UNET, "num_class_embeds": None, **changes})
    return DDPM(network, diffusers.DDPMScheduler())


def test_a_unet_of_open_size_takes_images_that_it_can_halve():
    model = denoiser(sample_size=None)
    for size in ((8, 12), (10, 6)):
        x0, condition = model.encode(collate([Example("a", torch.rand(1, *size))]))
        found = model.predict(x0, torch.randn_like(x0), torch.tensor([5]), condition)
        assert found.prediction.shape == x0.shape
    with pytest.raises(DminError, match=r"'a' is \(1, 9, 8\).*multiples of 2"):
        model.encode(collate([Example("a", torch.rand(1, 9, 8))]))
    with pytest.raises(DminError, match=r"model\.sample_size=\[HEIGHT,WIDTH\]"):
        model.sample([None], [1], 2)
    sized = DDPM(model.network, model.scheduler, sample_size=[8, 12])
    assert sized.sample([None], [1], 2).shape == (1, 1, 8, 12)


def test_a_unet_that_has_learned_its_variance():
    torch.manual_seed(0)
    plain = denoiser(out_channels=2)
    whole = DDPM(plain.network, plain.scheduler, variance_loss=True)
    x0, noise, t = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([700, 3])
    without, added = plain.predict(x0, noise, t, {}), whole.predict(x0, noise, t, {})
    assert without.prediction.shape == x0.shape and without.bound is None
    assert torch.equal(without.prediction, added.prediction) and (added.bound > 0).all()
    torch.testing.assert_close(per_example_loss(added), per_example_loss(without) + added.bound)
    assert plain.describe() != whole.describe()
    assert plain.sample([None], [1], 2).shape == (1, 1, 8, 8)
    with pytest.raises(DminError, match="predicts no variance"):
        DDPM(denoiser().network, plain.scheduler, variance_loss=True)
    with pytest.raises(DminError, match="class_embed_type=identity"):
        denoiser(class_embed_type="identity")
