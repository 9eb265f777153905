"""Adapters, other weights and ways to load: what arrives in the network, and what is refused."""

import inspect
import json
import logging
import re
import shutil

import pytest
import torch
import transformers
from models import original_layout as original
from models.families import FAMILIES, checkpoint, load
from models.tiny import clip
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from test_families import examples, inputs, one_sketch

from dmin.cli.config.groups import config_directory
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Example, collate
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Explicit
from dmin.gradients.parameters import LORA
from dmin.models import vae
from dmin.models.families.ddpm import DDPM
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic

# Some linear layers, and a convolution where there is one.
TARGETS = ["to_q", "to_v", "conv1"]


def randomise(network):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def diffusers_adapter(name, folder, alpha=2):
    """Train (well, draw) an adapter called "weird" and save it as diffusers' scripts do."""
    family = FAMILIES[name]
    pipeline = family.model.from_pretrained(checkpoint(name)).pipeline
    network = getattr(pipeline, family.model.network_name)
    config = LoraConfig(r=2, lora_alpha=alpha, target_modules=TARGETS)
    network.add_adapter(config, "weird")
    randomise(network)
    part = family.model.network_name
    pipeline.save_lora_weights(
        str(folder),
        **{
            f"{part}_lora_layers": get_peft_model_state_dict(network, adapter_name="weird"),
            f"{part}_lora_adapter_metadata": config.to_dict(),
        },
    )
    return network


def peft_adapter(network, folder):
    """The same with peft alone, for networks that diffusers has no loader for."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])
    adapted = get_peft_model(network, config, adapter_name="weird")
    randomise(adapted)
    adapted.save_pretrained(str(folder))
    return network, folder / "weird"


def load_anew(name, **settings):
    """A model that a test may change."""
    family = FAMILIES[name]
    return family.model.from_pretrained(checkpoint(name), **{**family.settings, **settings})


def predictions(model, network, name):
    """What two networks make of the same noised latents."""
    x0, noise, t, condition = inputs(model, FAMILIES[name])
    found = model.predict(x0, noise, t, condition).prediction.detach()
    own, model.network = model.network, network.eval()
    expected = model.predict(x0, noise, t, condition).prediction.detach()
    model.network = own
    return found, expected


@pytest.mark.parametrize("alpha", [2, 8])
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3", "flux", "sana"])
def test_a_diffusers_adapter_acts_under_a_name_of_ours(name, alpha, tmp_path):
    trained = diffusers_adapter(name, tmp_path, alpha)
    model = FAMILIES[name].model.from_pretrained(
        checkpoint(name), adapter=tmp_path, **FAMILIES[name].settings
    )
    named = [n for n, _ in model.network.named_parameters() if re.search(LORA, n)]
    assert named and all(".default." in n for n in named)
    assert not any(module.training for module in model.network.modules())
    found, expected = predictions(model, trained, name)
    torch.testing.assert_close(found, expected)
    assert (found - predictions(model, load(name).network, name)[1]).abs().max() > 1e-4
    assert model.describe()["adapters"]["default"]["lora_alpha"] == alpha


@pytest.mark.parametrize("name", ["dit", "pixart", "hunyuan_dit", "stable_diffusion"])
def test_a_peft_adapter_acts_under_a_name_of_ours(name, tmp_path):
    network = FAMILIES[name].model.from_pretrained(checkpoint(name)).network
    trained, folder = peft_adapter(network, tmp_path)
    model = FAMILIES[name].model.from_pretrained(
        checkpoint(name), adapter=folder, **FAMILIES[name].settings
    )
    assert any(re.search(r"lora_A\.default\.", n) for n, _ in model.network.named_parameters())
    found, expected = predictions(model, trained, name)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3", "dit"])
def test_only_the_adapter_can_be_attributed(name, tmp_path):
    if name == "dit":
        network = FAMILIES[name].model.from_pretrained(checkpoint(name)).network
        folder = peft_adapter(network, tmp_path / "adapter")[1]
    else:
        folder = tmp_path / "adapter"
        diffusers_adapter(name, folder)
    family = FAMILIES[name]
    model = family.model.from_pretrained(checkpoint(name), adapter=folder, **family.settings)
    noise = SharedNoise(seed=5)
    collector = GradientCollector(
        model, BlockCyclic(64, block=64), Explicit(family.timesteps), noise, params=LORA
    )
    lora = [n for n, _ in model.network.named_parameters() if "lora_" in n]
    assert [entry.name for entry in collector.attributed.entries] == lora
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    dataset = examples(family)
    store = collector.collect(dataset, tmp_path / "store", dtype="float32", trainer=trainer)
    encoded = model.encode(collate(dataset.examples))
    for row in range(3):
        for step, t in enumerate(collector.timesteps):
            expected = one_sketch(model, collector, encoded, row, t, noise)
            found = torch.from_numpy(store.features("loss", row, row + 1)[0, 0, step])
            assert (found - expected).norm() <= 1e-5


def kohya(module, down, up, alpha):
    name = f"lora_unet_{module.replace('.', '_')}"
    weights = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return {**weights, f"{name}.alpha": torch.tensor(float(alpha))}


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
KOHYA = {  # family -> {module in kohya's file: layers of ours that its matrix is joined of}
    "stable_diffusion": {
        f"{ATTENTION}.to_q": [f"{ATTENTION}.to_q"],
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": [
            "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
        ],
    },
    "stable_diffusion_xl": {  # in the names of the original layout
        "input_blocks_3_1_transformer_blocks_0_attn1_to_q": [f"{ATTENTION}.to_q"],
    },
    "flux": {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.txt_mod.lin": ["transformer_blocks.0.norm1_context.linear"],
        "single_blocks.0.linear1": [
            *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
            "single_transformer_blocks.0.proj_mlp",
        ],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    },
    "stable_diffusion_3": {
        "joint_blocks_0_context_block_attn_qkv": [
            f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"
        ],
        "joint_blocks_0_x_block_attn2_qkv": [f"transformer_blocks.0.attn2.to_{x}" for x in "qkv"],
    },
}


@pytest.mark.parametrize("name", KOHYA)
def test_an_adapter_in_kohyas_format_does_what_its_matrices_say(name, tmp_path):
    """W + α/r · up · down: the merged network by hand, against the adapter as it was loaded."""
    merged, state, rank, alpha = load_anew(name).network, {}, 2, 3
    weights = dict(merged.named_parameters())
    generator = torch.Generator().manual_seed(0)
    for module, layers in KOHYA[name].items():
        width = weights[f"{layers[0]}.weight"].shape[1]
        heights = [len(weights[f"{layer}.weight"]) for layer in layers]
        down = torch.randn(rank, width, generator=generator)
        up = torch.randn(sum(heights), rank, generator=generator)
        state |= kohya(module, down, up, alpha)
        for layer, part in zip(layers, up.split(heights), strict=True):
            weights[f"{layer}.weight"].data += alpha / rank * part @ down
    save_file(state, tmp_path / "kohya.safetensors")
    model = load_anew(name, adapter=tmp_path / "kohya.safetensors")
    lora = [n for n, _ in model.network.named_parameters() if re.search(LORA, n)]
    assert len(lora) == 2 * len(KOHYA[name])  # the file's own, not one for each layer of ours
    assert all(".default." in n for n in lora)
    found, expected = predictions(model, merged, name)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert (found - predictions(model, load(name).network, name)[1]).abs().max() > 1e-3


WRITTEN = {  # where trainers write α = 8 of rank 2
    "diffusers": {},
    "plain": {"lora_alpha": "8", "r": "2"},
    "kohya": {"ss_network_alpha": "8.0", "ss_network_dim": "2"},
    "network": {"network_alpha": "8", "rank": "2"},
    "tensors": {},
    "rank-stabilised": {},
    "by layer": {},
    "nowhere": None,
}


def adapter_file(network, folder, where):
    """Save an adapter whose file alone says its scale; return the network that has it."""
    config = LoraConfig(
        r=2,
        lora_alpha={"nowhere": 2, "by layer": 4}.get(where, 8),
        alpha_pattern={"to_q": 8, "to_v": 8} if where == "by layer" else {},
        target_modules=["to_q", "to_v"],
        use_rslora=where == "rank-stabilised",
    )
    adapted = get_peft_model(network, config, adapter_name="weird")
    randomise(adapted)
    state = get_peft_model_state_dict(adapted, adapter_name="weird")
    state = {k.replace("base_model.model.", "unet."): v.contiguous() for k, v in state.items()}
    if where == "tensors":
        layers = [k.removesuffix(".lora_A.weight") for k in state if "lora_A" in k]
        state |= {f"{layer}.alpha": torch.tensor(8.0) for layer in layers}
    header = WRITTEN[where]
    if where in ("diffusers", "rank-stabilised", "by layer"):
        told = {
            f"unet.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()
        }
        header = {"format": "pt", "lora_adapter_metadata": json.dumps(told)}
    save_file(state, folder / "one.safetensors", metadata=header)
    return network, folder / "one.safetensors"


@pytest.mark.parametrize("where", WRITTEN)
def test_the_scale_of_an_adapter_is_found_wherever_it_stands(where, ddpm_path, tmp_path):
    trained, file = adapter_file(DDPM.from_pretrained(ddpm_path).network, tmp_path, where)
    model = DDPM.from_pretrained(ddpm_path, adapter=file)
    x0, noise, t = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([700, 3])
    condition = model.condition([1, 2])
    found = model.predict(x0, noise, t, condition).prediction
    plain = DDPM.from_pretrained(ddpm_path).predict(x0, noise, t, condition).prediction
    model.network = trained.eval()
    expected = model.predict(x0, noise, t, condition).prediction
    torch.testing.assert_close(found, expected)
    assert (found - plain).abs().max() > 1e-4


@pytest.mark.parametrize("where", WRITTEN)
def test_a_scale_that_diffusers_does_not_read_is_read(where, tmp_path):
    name = "stable_diffusion"
    trained, file = adapter_file(load_anew(name).network, tmp_path, where)
    model = load_anew(name, adapter=file)
    found, expected = predictions(model, trained, name)
    torch.testing.assert_close(found, expected)
    described = model.describe()["adapters"]["default"]
    alpha = {"nowhere": 2, "rank-stabilised": 8 * 2**0.5}.get(where, 8)  # as a scale of α/r
    told = described["lora_alpha"], *described["alpha_pattern"].values()
    assert any(abs(value - alpha) < 1e-9 for value in told)


def test_several_adapters_act_together(tmp_path):
    name = "stable_diffusion"
    diffusers_adapter(name, tmp_path / "a")
    one = FAMILIES[name].model.from_pretrained(checkpoint(name), adapter=str(tmp_path / "a"))
    two = FAMILIES[name].model.from_pretrained(
        checkpoint(name), adapter=[str(tmp_path / "a"), str(tmp_path / "a")]
    )
    named = {n for n, _ in two.network.named_parameters() if "lora_A.default_1." in n}
    assert named
    found, once = predictions(two, one.network, name)
    assert (found - once).abs().max() > 1e-4


def test_adapters_of_another_model_are_refused(tmp_path):
    diffusers_adapter("stable_diffusion_3", tmp_path)
    for name in ("stable_diffusion", "dit", "flux", "sana"):
        with pytest.raises(DminError, match=r"do not fit .* Give an adapter"):
            FAMILIES[name].model.from_pretrained(checkpoint(name), adapter=tmp_path)
    with pytest.raises(DminError, match="with exactly one; found none"):
        FAMILIES["dit"].model.from_pretrained(checkpoint("dit"), adapter=tmp_path / "nowhere")


def test_ddpm_takes_adapters_and_averaged_weights(ddpm, ddpm_path, tmp_path):
    network = DDPM.from_pretrained(ddpm_path).network
    for parameter in network.parameters():
        parameter.data.mul_(0.5)
    save_file(network.state_dict(), tmp_path / "ema.safetensors")
    averaged = DDPM.from_pretrained(ddpm_path, ema=tmp_path / "ema.safetensors")
    for (name, found), own in zip(
        averaged.network.state_dict().items(), ddpm.network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, 0.5 * own, msg=name)
    folder = peft_adapter(network, tmp_path / "adapter")[1]
    adapted = DDPM.from_pretrained(ddpm_path, adapter=folder)
    assert any(re.search(LORA, n) for n, _ in adapted.network.named_parameters())
    assert adapted.describe() != averaged.describe()


def test_weights_from_a_folder_and_from_another_network(tmp_path):
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    unet = (
        FAMILIES["stable_diffusion"].model.from_pretrained(checkpoint("stable_diffusion")).network
    )
    average = EMAModel(
        [2 * p for p in unet.parameters()],
        model_cls=UNet2DConditionModel,
        model_config=unet.config,
    )
    average.save_pretrained(str(tmp_path / "ema"))
    model = FAMILIES["stable_diffusion"].model.from_pretrained(
        checkpoint("stable_diffusion"), ema=tmp_path / "ema"
    )
    torch.testing.assert_close(model.network.conv_in.weight, 2 * unet.conv_in.weight)
    with pytest.raises(DminError, match="not the weights of this DiT"):
        FAMILIES["dit"].model.from_pretrained(
            checkpoint("dit"),
            ema=checkpoint("pixart") / "transformer" / "diffusion_pytorch_model.safetensors",
        )
    with pytest.raises(DminError, match=r"neither a \.safetensors file nor a folder"):
        FAMILIES["dit"].model.from_pretrained(checkpoint("dit"), ema=tmp_path)


def test_checkpoints_that_are_not_there_are_refused(tmp_path):
    model = FAMILIES["stable_diffusion"].model
    with pytest.raises(DminError, match=r"no model_index\.json"):
        model.from_pretrained(tmp_path)
    with pytest.raises(DminError, match=r"no model_index\.json"):
        model.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(
        DminError, match="no such folder here, and it cannot be downloaded from the Hub"
    ):
        model.from_pretrained("nobody/nothing")
    with pytest.raises(
        DminError, match=r"a DiTPipeline, but model=\w+ needs a StableDiffusionPipeline"
    ):
        model.from_pretrained(checkpoint("dit"))
    with pytest.raises(DminError, match="torch_dtype='float16'"):
        model.from_pretrained(checkpoint("stable_diffusion"), torch_dtype="float16")
    with pytest.raises(DminError, match="from one file"):
        FAMILIES["dit"].model.from_pretrained(checkpoint("dit"), single_file="model.safetensors")


def in_original_layout(name, parts):
    """The weights of some components as single files have them."""
    pipeline = load(name).pipeline
    if name == "stable_diffusion_3":
        weights = original.sd3_weights(pipeline.transformer)
    else:
        weights = original.unet_weights(pipeline.unet)
    if "vae" in parts:
        weights |= original.vae_weights(pipeline.vae)
    if "text" in parts and name == "stable_diffusion":
        weights |= original.clip_weights(pipeline.text_encoder, "cond_stage_model.transformer.")
    return weights


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("stable_diffusion", ("vae", "text")),
        ("stable_diffusion", ("text",)),
        ("stable_diffusion", ()),
        ("stable_diffusion_xl", ("vae",)),
        ("stable_diffusion_xl", ()),
        ("stable_diffusion_3", ("vae",)),
        ("stable_diffusion_3", ()),
    ],
)
def test_one_file_in_the_original_layout(name, parts, tmp_path):
    """What the file does not hold comes from the checkpoint beside it; nothing is left random."""
    model, weights = load(name), in_original_layout(name, parts)
    again = load_anew(name, single_file=original.save(weights, tmp_path / "x.safetensors"))
    assert again.describe() == model.describe()
    for key, weight in model.network.state_dict().items():
        assert torch.equal(weight, again.network.state_dict()[key]), key


def test_one_file_with_both_text_encoders_of_sdxl(tmp_path):
    pipeline = load_anew("stable_diffusion_xl").pipeline
    torch.manual_seed(1)
    pipeline.text_encoder_2 = clip(transformers.CLIPTextModelWithProjection, hidden_size=24)
    pipeline.save_pretrained(str(tmp_path / "path"))
    weights = {
        **original.unet_weights(pipeline.unet),
        **original.vae_weights(pipeline.vae),
        **original.clip_weights(pipeline.text_encoder, "conditioner.embedders.0.transformer."),
        **original.open_clip_weights(pipeline.text_encoder_2, "conditioner.embedders.1.model."),
    }
    file = original.save(weights, tmp_path / "xl.safetensors")
    # Of the checkpoint only configs are left.
    for left in (tmp_path / "path").glob("*/*.safetensors"):
        left.unlink()
    model = FAMILIES["stable_diffusion_xl"].model.from_pretrained(
        tmp_path / "path", single_file=file
    )
    for name, encoder in model.encoders.items():
        for key, weight in getattr(pipeline, name).state_dict().items():
            torch.testing.assert_close(encoder.state_dict()[key], weight, msg=f"{name} {key}")


def test_one_file_that_does_not_do_is_refused(tmp_path):
    name = "stable_diffusion"
    with pytest.raises(DminError, match="cannot be read as a"):
        load_anew(name, single_file=tmp_path / "nowhere.safetensors")
    (tmp_path / "x.ckpt").write_bytes(b"pickled")
    with pytest.raises(DminError, match="a pickle, which can run code"):
        load_anew(name, single_file=tmp_path / "x.ckpt")
    other = original.save(in_original_layout("stable_diffusion_3", ()), tmp_path / "3.safetensors")
    with pytest.raises(DminError, match="cannot load it as a StableDiffusionPipeline"):
        load_anew(name, single_file=other)
    own = original.save(in_original_layout(name, ()), tmp_path / "unet.safetensors")
    shutil.copytree(checkpoint(name), tmp_path / "path")
    for left in (tmp_path / "path").glob("vae/*.safetensors"):
        left.unlink()
    with pytest.raises(DminError, match="holds no vae, text_encoder, which cannot be loaded"):
        FAMILIES[name].model.from_pretrained(tmp_path / "path", single_file=own)


def test_a_subfolder_and_a_variant(tmp_path):
    folder, model = checkpoint("stable_diffusion"), FAMILIES["stable_diffusion"].model
    described = load("stable_diffusion").describe()
    assert model.from_pretrained(folder.parent, subfolder=folder.name).describe() == described
    with pytest.raises(DminError, match="subfolder=nothing"):
        model.from_pretrained(folder, subfolder="nothing")
    load("stable_diffusion").pipeline.save_pretrained(str(tmp_path), variant="half")
    assert model.from_pretrained(tmp_path, variant="half").describe() == described
    with pytest.raises(DminError, match=r"model\.variant=quarter: .* Set model\.variant=half"):
        model.from_pretrained(tmp_path, variant="quarter")


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_losses_are_float32_and_gradients_finite(name):
    family = FAMILIES[name]
    model = load(name, torch_dtype="bfloat16")
    assert model.network.dtype == torch.bfloat16
    x0, noise, t, condition = inputs(model, family)
    prediction = model.predict(x0, noise, t, condition)
    assert prediction.prediction.dtype == prediction.target.dtype == torch.float32
    exact = load(name).predict(*inputs(load(name), family)).prediction
    assert (prediction.prediction - exact).norm() < 0.1 * exact.norm()
    collector = GradientCollector(model, BlockCyclic(256), Explicit([20]), params="weight")
    features = collector.features(x0[:1], {k: v[:1] for k, v in condition.items()}, ["a"])
    assert torch.isfinite(features.values["loss"]).all()


def test_a_draw_of_the_latent_is_keyed_and_shared():
    drawn, mode = load("stable_diffusion", latents="sample"), load("stable_diffusion")
    image = torch.rand(3, 16, 16)
    pair = collate([Example(i, image, caption="cat") for i in "ab"])
    x0, _ = drawn.encode(pair)
    assert torch.equal(x0[0], x0[1]) and torch.equal(x0, drawn.encode(pair)[0])
    assert not torch.allclose(x0, mode.encode(pair)[0])
    other = load("stable_diffusion", latents="sample", latent_seed=1)
    assert not torch.allclose(x0, other.encode(pair)[0])
    assert len({str(m.describe()) for m in (drawn, mode, other)}) == 3
    with pytest.raises(DminError, match="no posterior to draw from"):
        load("sana", latents="sample").encode(collate(examples(FAMILIES["sana"]).examples))


def test_captions_that_are_cut_are_told_once():
    model, told = load_anew("stable_diffusion"), []
    logger = logging.getLogger(type(model.pipeline).__module__)
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    next(f for f in logger.filters if hasattr(f, "said")).said = False
    logger.addHandler(handler)
    try:
        for _ in range(3):
            model.condition(["a very long caption of one hundred cats"])
    finally:
        logger.removeHandler(handler)
    assert len(told) == 1 and "are cut, such as" in told[0]


def test_latents_are_scaled_as_the_vae_says():
    image = torch.rand(2, 3, 16, 16)
    model = load("stable_diffusion_3")
    with torch.no_grad():
        mode = model.pipeline.vae.encode(2 * image - 1).latent_dist.mode()
        torch.testing.assert_close(vae.encode(model.pipeline.vae, image), (mode - 0.06) * 1.5)
    config = {"latents_mean": [1.0] * 4, "latents_std": [2.0] * 4, "scaling_factor": 0.5}
    torch.testing.assert_close(vae.scale(mode, config), (mode - 1) * 0.25)


def test_sd3_can_be_compared_with_noise_as_published():
    model = load("stable_diffusion_3", target="noise")
    x0, noise, t, condition = inputs(model, FAMILIES["stable_diffusion_3"])
    assert torch.equal(model.predict(x0, noise, t, condition).target, noise)
    assert model.describe() != load("stable_diffusion_3").describe()
    with pytest.raises(DminError, match=r"model\.target='x0'"):
        load("stable_diffusion_3", target="x0")


def offers(name):
    found = OmegaConf.to_container(OmegaConf.load(config_directory() / "model" / f"{name}.yaml"))
    bases = [offers(base) for base in found.pop("defaults", [])]
    return {key: value for each in (*bases, found) for key, value in each.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_yaml_offers_every_setting_with_its_default(name):
    offered = offers(FAMILIES[name].model.family)
    assert offered.pop("_target_").endswith(f"{FAMILIES[name].model.__name__}.from_pretrained")
    named = inspect.signature(FAMILIES[name].model.from_pretrained).parameters
    defaults = {key: "???" if p.default is p.empty else p.default for key, p in named.items()}
    own = {"max_sequence_length": "own_length", "embedded_guidance": "own_guidance"}
    for setting in own.keys() & defaults.keys():  # None stands for the family's own number
        defaults[setting] = getattr(FAMILIES[name].model, own[setting])
    assert offered == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}


def test_signatures_name_every_setting():
    for family in FAMILIES.values():
        named = inspect.signature(family.model.from_pretrained).parameters
        assert {"path", "adapter", "latents", *family.settings} <= set(named)
        assert all(p.kind is not p.VAR_KEYWORD for p in named.values())
    dit = inspect.signature(FAMILIES["dit"].model.from_pretrained).parameters
    assert "empty_captions" not in dit and "snr_gamma" in dit
