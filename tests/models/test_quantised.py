"""Quantised weights: what the libraries that made them give back, and a LoRA on them."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from models import original_layout as original
from models.families import EVERY, checkpoint, load
from oracle import Keep, backward
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import dmin
from dmin.data import collate
from dmin.gradients.parameters import choose_parameters
from dmin.models import adapters
from dmin.models.adapters.quantised import _numbers, _rounded, round_weights
from dmin.models.base import per_example_loss
from dmin.runtime.errors import DminError

MADE = load_file(Path(__file__).parent / "data/quantised.safetensors")
LAYERS = [name.removeprefix("truth.") for name in MADE if name.startswith("truth.")]
E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
STABLE = "stable_diffusion"


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_those_that_the_library_gives_back(name):
    own = {key: value for key, value in MADE.items() if key.startswith(f"{name}.")}
    found = {}
    for key in own:
        found |= _numbers(key, own.__getitem__, own, torch.float32)
    assert found.keys() == {f"{name}.weight"}
    truth = MADE[f"truth.{name}"].float()
    torch.testing.assert_close(found[f"{name}.weight"], truth, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["nf4_0", *(n for n in LAYERS if f"before.{n}" in MADE and n[0] == "q")]
)
def test_weights_are_rounded_as_the_library_rounds_them(name):
    kind = {"nf4": "nf4", "qint8": "int8", "qfloat8": "qfloat8"}[name.partition("_")[0]]
    found = _rounded(MADE[f"before.{name}"], kind)
    torch.testing.assert_close(found, MADE[f"truth.{name}"], rtol=0, atol=0)


def test_every_parameter_is_rounded_or_the_layers_alone():
    net = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Conv1d(3, 2, 1)).bfloat16()
    before = copy.deepcopy(net.state_dict())
    round_weights(net, "float8_e5m2")
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key].to(E5).bfloat16()), key
    net.load_state_dict(before)
    round_weights(net, "float8")
    scale = before["0.weight"].float().abs().max() / 448
    expected = ((before["0.weight"].float() / scale).to(E4).float() * scale).bfloat16()
    assert torch.equal(net[0].weight, expected) and torch.equal(net[1].weight, before["1.weight"])
    with pytest.raises(DminError, match=r"model\.base_dtype='fp8': allowed are float8_e4m3fn, "):
        round_weights(net, "fp8")


def kept(layer, weight, kind):
    """Tensors of a layer as files keep them, and the numbers that they stand for, by element."""
    if kind == "int8":  # of bitsandbytes
        largest = weight.abs().amax(1)
        codes = (weight / largest[:, None] * 127).round().to(torch.int8)
        beside = {"SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        truth = codes.float() * largest[:, None] / 127
    else:  # ComfyUI's, and musubi's blocks of rows
        shape = (len(weight), 2, 1) if "to_q" in layer else () if "to_k" in layer else (1,)
        scale = 0.001 + torch.rand(shape)
        wide = scale.expand(-1, -1, weight.shape[1] // 2).flatten(1) if scale.ndim == 3 else scale
        codes = (weight / wide).to(E4)
        beside, truth = {"scale_weight": scale, "scale_input": torch.rand(())}, codes.float() * wide
        if kind == "comfy":
            told = json.dumps({"format": "float8_e4m3fn"}).encode()
            beside = {"weight_scale": scale, "comfy_quant": torch.tensor(list(told)).byte()}
    return {f"{layer}.weight": codes, **{f"{layer}.{k}": v for k, v in beside.items()}}, truth


def quantised(state, kind):
    """Weights of a network as files keep them, and the numbers that they stand for."""
    if kind in (E4, E5):
        found = {key: weight.to(kind) for key, weight in state.items()}
        return found, {key: weight.float() for key, weight in found.items()}
    found, truth = dict(state), dict(state)
    for key, weight in state.items():
        if weight.ndim == 2 and "attn" in key:
            own, truth[key] = kept(key.removesuffix(".weight"), weight, kind)
            found |= own
    if kind == "scaled":
        found["scaled_fp8"] = torch.zeros(2).to(E4)
    return found, truth


def folder_of(to, kind):
    """A tiny checkpoint with a quantised network, and the numbers that its weights stand for."""
    folder = Path(shutil.copytree(checkpoint(STABLE), to))
    (file,) = (folder / "unet").glob("*.safetensors")
    found, truth = quantised(load_file(file), kind)
    file.unlink()
    halves = [{}, {}]  # what says how to read a weight may stand in another file
    for key, value in found.items():
        halves[key.endswith("weight")][key] = value
    where = {}
    for n, half in enumerate(halves):
        name = f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors"
        save_file(half, file.with_name(name), metadata={"format": "pt"})
        where |= dict.fromkeys(half, name)
    index = {"metadata": {}, "weight_map": where}
    file.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    if kind == "int8":
        config = json.loads((folder / "unet/config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        (folder / "unet/config.json").write_text(json.dumps(config))
    return folder, truth


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn{}.to_{}"


def rows_and_truth(model, oracle, layers, of):
    """Each example's gradients of factors, and autograd's through ``W + B·A`` of the oracle."""
    examples = [dmin.Example(c, torch.rand(3, 16, 16), caption=c) for c in ("a cat", "dog")]
    x0, condition = model.encode(collate(examples))
    noise, t = torch.randn_like(x0), torch.tensor([700, 20])
    chosen = choose_parameters(model.network, "lora")
    found, _ = backward(
        model.network,
        Keep(chosen),
        lambda: per_example_loss(model.predict(x0, noise, t, condition)),
    )
    leaves = {}
    for layer in layers:
        at = oracle.network.get_submodule(layer)
        weight = at.weight.detach()
        a, b = (of(model.network, layer, part).detach().requires_grad_() for part in "AB")
        leaves |= {f"{layer}.lora_A": a, f"{layer}.lora_B": b}
        del at.weight
        at.weight = weight + b @ a
    for n in range(2):
        cut = {k: v[n : n + 1] for k, v in condition.items()}
        prediction = oracle.predict(x0[n : n + 1], noise[n : n + 1], t[n : n + 1], cut)
        value = per_example_loss(prediction).sum()
        truth = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
        for name, gradient in zip(leaves, truth, strict=True):
            (own,) = (rows[n] for key, rows in found.items() if name in key)
            assert gradient.norm() > 0
            assert (own - gradient).norm() <= 1e-4 * gradient.norm(), name


def factor(network, layer, part):
    return getattr(network.get_submodule(layer), f"lora_{part}").default.weight


@pytest.mark.parametrize("kind", [E4, E5, "scaled", "comfy", "int8"])
def test_a_lora_on_a_quantised_base_is_autograds_at_the_numbers_in_the_file(kind, tmp_path):
    torch.manual_seed(0)
    folder, truth = folder_of(tmp_path / "base", kind)
    layers = [LAYER.format(1, "q"), LAYER.format(2, "k")]
    lora = {f"unet.{n}.lora_{x}.weight": 0.1 * torch.randn(16, 16) for n in layers for x in "AB"}
    save_file(lora, tmp_path / "lora.safetensors")
    family = EVERY[STABLE].model
    model = family.from_pretrained(folder, adapter=tmp_path / "lora.safetensors")
    oracle = family.from_pretrained(checkpoint(STABLE))
    oracle.network.load_state_dict(truth)
    for name, weight in adapters.without_adapters(model.network).state_dict().items():
        torch.testing.assert_close(weight, truth[name], rtol=1e-6, atol=1e-9, msg=name)
    assert model.describe() != load(STABLE).describe()
    rows_and_truth(model, oracle, layers, factor)


@pytest.mark.parametrize("kind", [E4, "scaled", "comfy"])
def test_one_file_of_quantised_weights(kind, tmp_path):
    plain = load(STABLE)
    found, truth = quantised(original.unet_weights(plain.network), kind)
    file = original.save(found, tmp_path / "x.safetensors")
    again = EVERY[STABLE].model.from_pretrained(checkpoint(STABLE), single_file=file)
    file = original.save(truth, tmp_path / "y.safetensors")
    expected = EVERY[STABLE].model.from_pretrained(checkpoint(STABLE), single_file=file)
    for name, weight in expected.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], weight, rtol=1e-6, atol=1e-9)


def test_layouts_that_are_not_known_are_refused_with_what_to_do(tmp_path):
    folder = Path(shutil.copytree(checkpoint(STABLE), tmp_path / "base"))
    (file,) = (folder / "unet").glob("*.safetensors")
    state, layer = load_file(file), LAYER.format(1, "q")
    told = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode())).byte()
    codes, many = torch.zeros(16, 16).to(torch.int8), torch.ones(7)
    for beside, named in (
        ({"comfy_quant": told, "weight": codes}, "its format is nvfp4"),
        (
            {"weight_scale": many, "weight": codes},
            r"its scales \[7\] do not fit weights \[16, 16\]",
        ),
        ({"SCB": many, "weight_format": torch.tensor(1).byte()}, "for one type of GPU"),
        ({"weight.quant_map": many, "weight": codes}, "int8 in an unknown layout"),
    ):
        save_file({**state, **{f"{layer}.{k}": v for k, v in beside.items()}}, file)
        with pytest.raises(DminError, match=rf"to_q\.weight cannot be read: .*{named}.*base_dtype"):
            EVERY[STABLE].model.from_pretrained(folder)
    save_file(state, file)
    config = json.loads((folder / "unet/config.json").read_text())
    told = {**config, "quantization_config": {"quant_method": "torchao"}}
    (folder / "unet/config.json").write_text(json.dumps(told))
    with pytest.raises(DminError, match=r"unet: its weights are quantised by torchao.*model\.base"):
        EVERY[STABLE].model.from_pretrained(folder)


def test_the_base_is_rounded_and_the_adapter_is_not(tmp_path):
    layer = LAYER.format(1, "q")
    lora = {f"unet.{layer}.lora_{x}.weight": torch.randn(16, 16) for x in "AB"}
    save_file(lora, tmp_path / "lora.safetensors")
    model, plain = EVERY[STABLE].model, load(STABLE)
    given = {"adapter": tmp_path / "lora.safetensors", "base_dtype": "float8_e4m3fn"}
    network = model.from_pretrained(checkpoint(STABLE), **given).network
    assert torch.equal(factor(network, layer, "A"), lora[f"unet.{layer}.lora_A.weight"])
    for name, weight in adapters.without_adapters(network).state_dict().items():
        assert torch.equal(weight, plain.network.state_dict()[name].to(E4).float()), name


class Int8(nn.Linear):
    """A layer that keeps bytes and computes with what they stand for."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        own, self.truth = kept("x", layer.weight.detach(), "int8")
        self.weight = nn.Parameter(own["x.weight"], requires_grad=False)
        self.bias, self.scale = layer.bias, own["x.SCB"] / 127

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.scale[:, None], self.bias)


def test_a_pipeline_in_hand_whose_layers_are_quantised():
    torch.manual_seed(0)
    pipeline = EVERY[STABLE].model.from_pretrained(checkpoint(STABLE)).pipeline
    oracle = EVERY[STABLE].model.from_pretrained(checkpoint(STABLE))
    for name, layer in list(pipeline.unet.named_modules()):
        if isinstance(layer, nn.Linear) and "attn" in name:
            above, _, last = name.rpartition(".")
            new = Int8(layer)
            setattr(pipeline.unet.get_submodule(above), last, new)
            oracle.network.get_submodule(name).weight.data = new.truth
    layers = [LAYER.format(1, "q"), LAYER.format(2, "k")]
    config = LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    model = dmin.from_pipeline(pipeline)
    rows_and_truth(model, oracle, layers, factor)
    with pytest.raises(DminError, match=r"cannot differentiate .*attn1.*int8.*unquantised"):
        choose_parameters(model.network)
    pipeline.unet.delete_adapters("default")
    pipeline.unet.enable_layerwise_casting(E4, torch.float32)
    with pytest.raises(DminError, match=r"unet .*hooks of diffusers.*base_dtype"):
        dmin.from_pipeline(pipeline)
