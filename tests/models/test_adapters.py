"""Every kind of adapter: W + ΔW and each factor's gradient against formulas and autograd."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from diffusers.loaders import single_file_utils
from diffusers.models.normalization import RMSNorm
from models.families import EVERY, checkpoint
from models.original_layout import unet_weights
from oracle import Keep, backward
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call

from dmin.data import Example, collate
from dmin.gradients.groups import grouped
from dmin.gradients.parameters import choose_parameters
from dmin.models import adapters
from dmin.models.adapters import load_adapters, save_adapters, without_adapters
from dmin.models.adapters.names import flat, places
from dmin.models.base import per_example_loss
from dmin.runtime.errors import DminError

R, ALPHA = 2, 3.0


class Net(nn.Module):
    """A convolution and a linear layer, both of which adapters are made for."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.lin = nn.Linear(6, 8)

    def forward(self, x):
        return self.lin(self.conv(x).tanh().flatten(2).transpose(1, 2)).tanh()


SIZES = {"conv": (6, 4, (3, 3), (2, 2)), "lin": (8, 6, (), (4, 3))}  # out, in, kernel, a × c


def product(a, b):
    return torch.einsum("or,ri->oi", a.flatten(1), b.flatten(1))


def tucker(core, out, into):
    return torch.einsum("ijxy,io,jq->oqxy", core, out, into)


def lora(o, i, k, _):
    return {"lora_up.weight": (o, R, *[1] * len(k)), "lora_down.weight": (R, i, *k)}


def tucker_lora(o, i, k, _):
    return {**lora(o, i, (1, 1), _), "lora_mid.weight": (R, R, *k)}


def loha(o, i, k, _):
    a, b = (o, R), (R, i * torch.Size(k).numel())
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}


def tucker_loha(o, i, k, _):
    sides = {f"hada_w{n}_{side}": (R, o if side == "a" else i) for n in "12" for side in "ab"}
    return {**sides, "hada_t1": (R, R, *k), "hada_t2": (R, R, *k)}


def lokr(o, i, k, ac):
    return {"lokr_w1": ac, **loha_free(o // ac[0], i // ac[1], k)}


def loha_free(b, d, k):
    return {"lokr_w2_a": (b, R), "lokr_w2_b": (R, d * torch.Size(k).numel())}


def factored_lokr(o, i, k, ac):
    left = {"lokr_w1_a": (ac[0], R), "lokr_w1_b": (R, ac[1])}
    return {**left, **loha_free(o // ac[0], i // ac[1], k)}


def full_lokr(o, i, k, ac):
    return {"lokr_w1": ac, "lokr_w2": (o // ac[0], i // ac[1], *k)}


def tucker_lokr(o, i, k, ac):
    sides = {"lokr_w2_a": (R, o // ac[0]), "lokr_w2_b": (R, i // ac[1])}
    return {"lokr_w1": ac, **sides, "lokr_t2": (R, R, *k)}


def change(t, shape):
    """ΔW by the formula of each kind, unscaled."""
    if "lora_mid.weight" in t:
        up, down = t["lora_up.weight"], t["lora_down.weight"]
        return tucker(t["lora_mid.weight"], up.flatten(1).T, down.flatten(1))
    if "lora_up.weight" in t:
        return product(t["lora_up.weight"], t["lora_down.weight"]).reshape(shape)
    if "hada_t1" in t:
        halves = [tucker(t[f"hada_t{n}"], t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]) for n in "12"]
        return halves[0] * halves[1]
    if "hada_w1_a" in t:
        halves = [product(t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]) for n in "12"]
        return (halves[0] * halves[1]).reshape(shape)
    left = t["lokr_w1"] if "lokr_w1" in t else product(t["lokr_w1_a"], t["lokr_w1_b"])
    if "lokr_t2" in t:
        right = tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        right = t["lokr_w2"] if "lokr_w2" in t else product(t["lokr_w2_a"], t["lokr_w2_b"])
    (a, c), (o, i) = left.shape, shape[:2]
    right = right.reshape(o // a, i // c, -1)
    return torch.einsum("ac,bdk->abcdk", left, right).reshape(shape)


def shaped(magnitude, shape):
    axis = {"out": 0, "in": 1}[magnitude]
    return [n if i == axis else 1 for i, n in enumerate(shape)]


def weights(net, tensors, magnitude, scale):
    """What the layers' weights are by formula, differentiable in the tensors of the file."""
    found = {}
    for name, own in tensors.items():
        base = net.get_submodule(name).weight
        weight = base + scale * change(own, base.shape)
        if magnitude:
            axes = [d for d in range(weight.ndim) if d != {"out": 0, "in": 1}[magnitude]]
            norm = weight.detach().square().sum(axes, keepdim=True).sqrt()
            weight = own["dora_scale"] * weight / norm
        found[f"{name}.weight"] = weight
    return found


def made(kind, magnitude, layers=("conv", "lin")):
    torch.manual_seed(1)
    net = Net().double()
    tensors = {}
    for name in layers:
        shapes = kind(*SIZES[name])
        if magnitude:
            shapes["dora_scale"] = shaped(magnitude, net.get_submodule(name).weight.shape)
        tensors[name] = {key: torch.randn(shape).double() for key, shape in shapes.items()}
    return net, tensors


def save(tensors, path, prefix="lora_unet_", alpha=ALPHA):
    state = {f"{prefix}{n}.{k}": v for n, own in tensors.items() for k, v in own.items()}
    told = {} if alpha is None else {f"{prefix}{n}.alpha": torch.tensor(alpha) for n in tensors}
    save_file({k: v.clone() for k, v in {**state, **told}.items()}, path)
    return state


KINDS = {
    "LoRA": (lora, None),
    "DoRA": (lora, "out"),
    "DoRA of inputs": (lora, "in"),
    "LoHa": (loha, None),
    "LoHa with magnitudes": (loha, "in"),
    "LoKr": (lokr, None),
    "LoKr with magnitudes": (lokr, "out"),
    "LoKr, both factored": (factored_lokr, None),
    "LoKr, both full": (full_lokr, None),
    "Tucker LoCon": (tucker_lora, None),
    "Tucker LoHa": (tucker_loha, None),
    "Tucker LoKr": (tucker_lokr, "out"),
}


FACTORS = {
    "lora_up.weight": "lora_B",
    "lora_down.weight": "lora_A",
    "lora_mid.weight": "lora_mid",
    "dora_scale": "lora_magnitude_vector",
}


def gradients_of_file(net, state):
    """Every example's gradient of each tensor of the file, as the network's factors have it."""
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    chosen = choose_parameters(net, "lora")
    kept, _ = backward(net, Keep(chosen), lambda: net(x).square().flatten(1).mean(1))
    found = {}
    for key in state:
        layer, factor = key.removeprefix("lora_unet_").split(".", 1)
        name = f"{layer}.{FACTORS.get(factor, factor)}.default.weight"
        if factor.startswith("hada"):
            name = f"{layer}.hada.default.{factor.removeprefix('hada_')}"
        turned = factor == "lokr_w2_a" and f"lora_unet_{layer}.lokr_t2" in state
        found[key] = kept[name].flatten(2).transpose(1, 2) if turned else kept[name]
    assert len(found) == len(chosen.entries)
    return x, found


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_its_formula_and_its_gradients_are_autograds(kind, tmp_path):
    shapes, magnitude = KINDS[kind]
    layers = ("conv",) if "Tucker" in kind else ("conv", "lin")
    net, tensors = made(shapes, magnitude, layers)
    state = save(tensors, tmp_path / "a.safetensors")
    leaves = [tensor.requires_grad_() for own in tensors.values() for tensor in own.values()]
    truth = weights(net, tensors, magnitude, 1.0 if "full" in kind else ALPHA / R)
    plain = Net().double()
    plain.load_state_dict(net.state_dict())
    load_adapters(net, tmp_path / "a.safetensors")
    x, found = gradients_of_file(net, state)
    torch.testing.assert_close(net(x), functional_call(plain, truth, x), rtol=1e-10, atol=1e-12)
    for b in range(len(x)):
        value = functional_call(plain, truth, x[b : b + 1]).square().mean()
        expected = torch.autograd.grad(value, leaves, retain_graph=True)
        for key, gradient in zip(state, expected, strict=True):
            own = found[key][b].reshape(gradient.shape)
            assert (own - gradient).norm() <= 1e-10 * max(gradient.norm(), 1e-4), key
    save_adapters(net, tmp_path / "again")
    again = Net().double()
    again.load_state_dict(plain.state_dict())
    load_adapters(again, tmp_path / "again/default")
    torch.testing.assert_close(again(x), net(x), rtol=0, atol=0)
    torch.testing.assert_close(without_adapters(net)(x), plain(x), rtol=0, atol=0)


def test_a_part_of_several_adapters_is_each_ones_own(tmp_path):
    """Two act together: each changes the base by itself."""
    (net, one), (_, two) = made(lora, "out"), made(loha, None)
    save(one, tmp_path / "one.safetensors")
    save(two, tmp_path / "two.safetensors", "unet.", alpha=None)
    base = {name: net.get_submodule(name).weight.detach().clone() for name in SIZES}
    first, second = weights(net, one, "out", ALPHA / R), weights(net, two, None, 1.0)
    merged = {f"{n}.weight": first[f"{n}.weight"] + second[f"{n}.weight"] - base[n] for n in base}
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    expected = functional_call(net, merged, x)
    load_adapters(net, [tmp_path / "one.safetensors", tmp_path / "two.safetensors"])
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)


PEFT = {"lora_up.weight": "lora_B.weight", "lora_down.weight": "lora_A.weight"}


@pytest.mark.parametrize(
    "start, names, config, scale",
    [
        ("base_model.model.", PEFT, {"peft_type": "LORA", "r": R, "lora_alpha": 8}, 8 / R),
        ("base_model.model.", PEFT, {"r": 9, "lora_alpha": 1, "alpha_pattern": {"lin": 5}}, None),
        ("diffusion_model.", PEFT, None, 1.0),
        ("model.diffusion_model.", {}, None, 1.0),
        ("lora_transformer_", {}, None, 1.0),
        ("lycoris_", {}, None, 1.0),
        ("", PEFT, None, 1.0),
        ("unet.", {k: k.replace("_up", ".up").replace("_down", ".down") for k in PEFT}, None, 1.0),
    ],
)
def test_the_names_and_the_scale_of_each_trainer(start, names, config, scale, tmp_path):
    net, tensors = made(lora, None)
    own = {n: {names.get(k, k): v for k, v in t.items()} for n, t in tensors.items()}
    save(own, tmp_path / "adapter_model.safetensors", start, alpha=None)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scales = {"conv": scale or 1 / R, "lin": scale or 5 / R}
    truth = {}
    for name in tensors:
        truth |= weights(net, {name: tensors[name]}, None, scales[name])
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    expected = functional_call(net, truth, x)
    load_adapters(net, tmp_path)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)


def test_two_whole_factors_of_lokr_have_a_scale_in_peft_alone(tmp_path):
    net, tensors = made(full_lokr, None)
    save(tensors, tmp_path / "adapter_model.safetensors", "base_model.model.", alpha=None)
    config = {"peft_type": "LOKR", "r": 4, "alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    expected, again = functional_call(net, weights(net, tensors, None, 2.0), x), deepcopy(net)
    load_adapters(net, tmp_path)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)
    save_adapters(net, tmp_path / "again")  # with what its config says
    load_adapters(again, tmp_path / "again/default")
    torch.testing.assert_close(again(x), expected, rtol=1e-10, atol=1e-12)


class Normed(Net):
    """The same with three kinds of norms."""

    def __init__(self):
        super().__init__()
        self.group, self.norm, self.plain = nn.GroupNorm(2, 6), nn.LayerNorm(8), RMSNorm(8, 1e-6)
        for norm in (self.group, self.norm, self.plain):
            norm.weight.data.normal_()

    def forward(self, x):
        x = self.group(self.conv(x)).tanh().flatten(2).transpose(1, 2)
        return self.plain(self.norm(self.lin(x)).tanh())


ENDS = {"conv": ("diff", "diff_b"), "lin": ("diff", "diff_b"), "plain": ("w_norm",)}
ENDS |= {"group": ("w_norm", "b_norm"), "norm": ("w_norm", "b_norm")}


def test_whole_differences_and_norms_are_added_and_their_gradients_are_autograds(tmp_path):
    torch.manual_seed(3)
    net, state, at = Normed().double(), {}, {}
    for layer, ends in ENDS.items():
        for end, part in zip(ends, ("weight", "bias"), strict=False):
            value = 0.3 * torch.randn_like(getattr(net.get_submodule(layer), part)).detach()
            state[f"lora_unet_{layer}.{end}"] = value
            at[f"{layer}.{part}"] = value.clone().requires_grad_()
    save_file(state, tmp_path / "a.safetensors")
    plain = deepcopy(net)
    truth = {name: plain.get_parameter(name).detach() + value for name, value in at.items()}
    load_adapters(net, tmp_path / "a.safetensors")
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(net(x), functional_call(plain, truth, x), rtol=1e-6, atol=1e-8)
    chosen = choose_parameters(net, "lora")
    found, _ = backward(net, Keep(chosen), lambda: net(x).square().flatten(1).mean(1))
    assert len(found) == len(state)
    for b in range(len(x)):
        value = functional_call(plain, truth, x[b : b + 1]).square().mean()
        expected = torch.autograd.grad(value, list(at.values()), retain_graph=True)
        for name, gradient in zip(at, expected, strict=True):
            layer, part = name.split(".")
            own = found[f"{layer}.lora_diff.default.{part}"][b].reshape(gradient.shape)
            assert (own - gradient).norm() <= 1e-6 * max(gradient.norm(), 1e-4), name
    torch.testing.assert_close(without_adapters(net)(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"norm.b_norm": torch.ones(8)}, "norm has lora_diff_b, which is not a supported set"),
        ({"norm.w_norm": torch.ones(6)}, r"norm \(6, but the layer is 8\)"),
        (
            {"plain.w_norm": torch.ones(8), "plain.b_norm": torch.ones(8)},
            "8 biases, which the layer",
        ),
        (
            {f"norm.{k}": torch.ones(v) for k, v in lora(8, 8, (), None).items()},
            "a norm, which needs",
        ),
        (
            {"lin.diff": torch.ones(8, 6), "lin.dora_scale": torch.ones(8, 1)},
            "magnitudes together with a who",
        ),
    ],
)
def test_differences_that_do_not_fit_are_refused(changes, said, tmp_path):
    save_file({f"lora_unet_{k}": v for k, v in changes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(DminError, match=said):
        load_adapters(Normed(), tmp_path / "a.safetensors")


def test_every_tensor_is_accounted_for(tmp_path):
    net, tensors = made(lora, None)
    state = save(tensors, tmp_path / "a.safetensors")
    refused = {
        "lora_unet_lin.oft_blocks": "an OFT adapter",
        "lora_unet_lin.diff_b": "not a supported set of tensors",
        "bundle_emb.mug.clip_l": "vectors of 1 dimensions, but this model's encoders have none",
        "lora_unet_lin.surprise": "not an adapter tensor",
        "lora_unet_lin.hada_w1_a": "not a supported set of tensors",
        "lora_te_text_model_x.alpha": "not a supported set of tensors",
        "lora_unet_lin.lora.up.weight": "are the same tensor of one module",
    }
    for key, message in refused.items():
        save_file({**state, key: torch.zeros(1)}, tmp_path / "a.safetensors")
        with pytest.raises(DminError, match=message):
            load_adapters(net, tmp_path / "a.safetensors")
    twice = {**state, **{k.replace("lora_unet_", "unet."): v for k, v in state.items()}}
    save_file({k: v.clone() for k, v in twice.items()}, tmp_path / "a.safetensors")
    with pytest.raises(DminError, match="adapts a layer that another module adapts too"):
        load_adapters(net, tmp_path / "a.safetensors")
    nan = {**state, "lora_unet_lin.lora_up.weight": torch.full((8, R), torch.nan)}
    save_file(nan, tmp_path / "a.safetensors")
    with pytest.raises(DminError, match=r"lora_unet_lin\.lora_up\.weight has infinite or NaN"):
        load_adapters(net, tmp_path / "a.safetensors")


def test_what_fits_and_what_does_not_is_told(tmp_path):
    net, tensors = made(lora, None)
    tensors["lin2"] = tensors["lin"]
    tensors["lin"] = {k: torch.randn(v) for k, v in lora(8, 5, (), None).items()}
    save(tensors, tmp_path / "a.safetensors")
    said = r"2 of its 3 modules do not fit Net, .*lin \(8×5, but the layer is 8×6\).*lin2 \(no such"
    with pytest.raises(DminError, match=said):
        load_adapters(net, tmp_path / "a.safetensors")
    (tmp_path / "b.ckpt").write_bytes(b"x")
    with pytest.raises(DminError, match=r"b\.ckpt: a pickle.*Convert it: python -c"):
        load_adapters(net, tmp_path / "b.ckpt")
    for config, said in (
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"use_dora": 1}, "no m"),
    ):
        folder = tmp_path / said
        folder.mkdir()
        save(made(lora, None)[1], folder / "a.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(DminError, match=said):
            load_adapters(net, folder)


def load_anew(name, **settings):
    family = EVERY[name]
    return family.model.from_pretrained(checkpoint(name), **{**family.settings, **settings})


def whole(network, name):
    return network.get_parameter(f"{name}.weight")


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_every_layer_of_a_unet_is_known_by_its_published_name(name, tmp_path):
    """The converter of the tests for single files is the oracle."""
    network = load_anew(name).network
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for number, layer in enumerate(layers):  # where the original's layer went, by its weight
        whole(network, layer).data.fill_(number + 1)
    state = {}
    for key, weight in unet_weights(network).items():
        layer = key.removesuffix(".weight")
        number = int(weight.flatten()[0]) - 1 if key.endswith("weight") and weight.ndim > 1 else -1
        if number >= 0:
            plain = f"lora_unet_{layer.removeprefix('model.diffusion_model.').replace('.', '_')}"
            given = plain if number % 2 else layer.removeprefix("model.")
            state[f"{given}.lora_up.weight"] = torch.ones(len(weight), 1)
            state[f"{given}.lora_down.weight"] = torch.full((1, *weight.shape[1:]), number + 1.0)
    assert len(state) == 2 * len(layers)
    save_file(state, tmp_path / "a.safetensors")
    load_adapters(network, tmp_path / "a.safetensors")
    for layer in layers:
        adapted = network.get_submodule(layer)
        assert adapted.lora_A.default.weight.flatten()[0] == adapted.weight.flatten()[0], layer


def pair(rows, columns, r=R):
    return {"lora_up.weight": torch.randn(rows, r), "lora_down.weight": torch.randn(r, columns)}


def test_the_order_of_what_flux_joins_and_swaps(tmp_path):
    """qkv and mlp in a row; the last modulation has shift and scale the other way round."""
    network = load_anew("flux").network
    single = "single_transformer_blocks.0"
    parts = [*(f"{single}.attn.to_{x}" for x in "qkv"), f"{single}.proj_mlp"]
    before = {n: whole(network, n).clone() for n in [*parts, "norm_out.linear", "proj_out"]}
    heights = [len(before[part]) for part in parts]
    out, into = before["norm_out.linear"].shape
    tensors = {
        "single_blocks_0_linear1": pair(sum(heights), before[parts[0]].shape[1]),
        "final_layer_adaLN_modulation_1": pair(out, into),
        "final_layer_linear": pair(*before["proj_out"].shape),
    }
    save(tensors, tmp_path / "a.safetensors")
    load_adapters(network, tmp_path / "a.safetensors")
    delta = {
        name: ALPHA / R * change(t, (len(t["lora_up.weight"]), -1)) for name, t in tensors.items()
    }
    first, last = delta["final_layer_adaLN_modulation_1"].chunk(2)
    expected = dict(zip(parts, delta["single_blocks_0_linear1"].split(heights), strict=True))
    expected |= {
        "norm_out.linear": torch.cat([last, first]),
        "proj_out": delta["final_layer_linear"],
    }
    for name, added in expected.items():
        layer, x = network.get_submodule(name), torch.randn(3, before[name].shape[1])
        torch.testing.assert_close(
            layer(x) - layer.base_layer(x), x @ added.T, atol=1e-4, rtol=1e-4
        )
    q, k = (network.get_submodule(part) for part in parts[:2])
    assert q.lora_A.default.weight is k.lora_A.default.weight  # one factor of the file, shared


def test_blocks_of_a_split_qkv_have_the_scale_they_were_trained_with(tmp_path):
    network = load_anew("flux").network
    parts = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    height, width = whole(network, parts[0]).shape
    pairs = [pair(height, width) for _ in parts]
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {
        f"{name}.lora_up.weight": torch.block_diag(*(p["lora_up.weight"] for p in pairs)),
        f"{name}.lora_down.weight": torch.cat([p["lora_down.weight"] for p in pairs]),
        f"{name}.alpha": torch.tensor(ALPHA),
    }
    told = {"ss_network_args": json.dumps({"split_qkv": "True"})}
    save_file(state, tmp_path / "a.safetensors", metadata=told)
    load_adapters(network, tmp_path / "a.safetensors")
    for part, own in zip(parts, pairs, strict=True):
        layer, x = network.get_submodule(part), torch.randn(3, width)
        added = ALPHA / R * change(own, (height, width))
        torch.testing.assert_close(
            layer(x) - layer.base_layer(x), x @ added.T, atol=1e-5, rtol=1e-4
        )
    state[f"{name}.lora_up.weight"] += 1
    save_file(state, tmp_path / "a.safetensors", metadata=told)
    with pytest.raises(DminError, match=r"split_qkv=True, but .* is not made of 3 blocks"):
        load_anew("flux", adapter=tmp_path / "a.safetensors")


TEXT = {  # module in kohya's file -> layer of the pipeline
    "stable_diffusion": {
        "lora_te_text_model_encoder_layers_1_mlp_fc1": ("text_encoder", "encoder.layers.1.mlp.fc1")
    },
    "stable_diffusion_xl": {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (
            "text_encoder",
            "encoder.layers.0.mlp.fc1",
        ),
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": (
            "text_encoder_2",
            "text_model.encoder.layers.0.self_attn.q_proj",
        ),
    },
    "flux": {
        "lora_te1_text_model_encoder_layers_1_mlp_fc1": (
            "text_encoder",
            "encoder.layers.1.mlp.fc1",
        ),
        "lora_te3_encoder_block_0_layer_1_DenseReluDense_wo": (
            "text_encoder_2",
            "encoder.block.0.layer.1.DenseReluDense.wo",
        ),
    },
}


def with_text(name, pipeline, chosen=slice(None)):
    """The text encoders' part of a file, which is added to the weights of a pipeline."""
    state = {}
    for start, (encoder, path) in list(TEXT[name].items())[chosen]:
        layer = getattr(pipeline, encoder).get_submodule(path)
        own = pair(*layer.weight.shape)
        state |= {f"{start}.{key}": value for key, value in own.items()}
        layer.weight.data += change(own, layer.weight.shape)
    return state


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "flux"])
def test_the_part_of_a_text_encoder_acts_on_prompts(name, tmp_path):
    """What a default run of kohya leaves: names of text encoders are older than those of today."""
    plain, merged = load_anew(name), load_anew(name)
    state = with_text(name, merged.pipeline)
    save_file(state, tmp_path / "a.safetensors")
    model = load_anew(name, adapter=tmp_path / "a.safetensors", text_encoders="frozen")
    prompts = ["a red cat", "dog"]
    found, expected, before = (m.condition(prompts) for m in (model, merged, plain))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)
    assert any((before[key] - found[key]).abs().max() > 1e-4 for key in found)
    assert model.describe()["encoders"] != plain.describe()["encoders"]
    model.save_pretrained(tmp_path / "saved")
    again = load_anew(name).from_pretrained(tmp_path / "saved", **EVERY[name].settings)
    torch.testing.assert_close(again.condition(prompts), before)


NETWORK = {
    "flux": "lora_transformer_transformer_blocks_0_attn_to_q",
    "stable_diffusion": "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
}


@pytest.mark.parametrize("name, part", [*((n, slice(None)) for n in TEXT), ("flux", slice(1))])
def test_gradients_of_text_encoders_join_the_row(name, part, tmp_path):
    """Against autograd through the pipeline's own encoding, an example at a time.

    Of Flux also CLIP alone, as kohya trains it: T5 then is not run in the pass.
    """
    torch.manual_seed(4)
    state = with_text(name, load_anew(name).pipeline, part)
    layer = NETWORK.get(name, NETWORK["stable_diffusion"])
    state |= {f"{layer}.{key}": value for key, value in pair(16, 16).items()}
    save_file(state, tmp_path / "a.safetensors")
    model = load_anew(name, adapter=tmp_path / "a.safetensors", prompt_dropout=0.25)
    encoders = {encoder for encoder, _ in list(TEXT[name].values())[part]}
    assert set(model.describe()["text_encoders"]) == encoders
    assert not encoders & set(model.encoders)
    settings = {"prompt_dropout": 0.25, **EVERY[name].settings}
    frozen = type(model)(model.pipeline, text_encoders="frozen", **settings)
    images = [Example(c, torch.rand(3, 16, 16), caption=c) for c in ("a red cat", "dog", "blue")]
    x0, condition = model.encode(collate(images))
    noise, t = torch.randn(x0.shape), torch.tensor([700, 20, 300])
    chosen = choose_parameters(model.network, "lora")
    assert set(grouped(chosen, "block").groups) == {"network", *encoders}
    found, _ = backward(
        model.network,
        Keep(chosen),
        lambda: per_example_loss(model.predict(x0, noise, t, condition)),
    )
    named = dict(model.network.named_parameters())
    leaves = [named[entry.name].requires_grad_() for entry in chosen.entries]
    assert len(leaves) == len(state)
    for b, image in enumerate(images):
        told = frozen.encode(collate([image]))[1]
        prediction = frozen.predict(x0[b : b + 1], noise[b : b + 1], t[b : b + 1], told)
        expected = torch.autograd.grad(per_example_loss(prediction).sum(), leaves)
        for entry, gradient in zip(chosen.entries, expected, strict=True):
            assert gradient.norm() > 0
            assert (found[entry.name][b] - gradient).norm() <= 1e-4 * gradient.norm(), entry.name


CONVERTERS = {
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "flux_2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_published_names_lead_where_diffusers_puts_their_weights(name):
    network = load_anew(name).network
    names, state = places(network), {}
    known = yaml.safe_load(Path(adapters.__file__).with_name("original_names.yaml").read_text())
    for blocks, inside in known[type(network).__name__].items():
        outside = blocks == "outside"
        starts = range(1 if outside else len(getattr(network, blocks.split()[1])))
        for original in (
            f"{'' if outside else f'{blocks.split()[0]}.{n}.'}{key}"
            for n in starts
            for key in inside
        ):
            where = names.get(flat(original), [])
            if where:
                joined = torch.cat([whole(network, place.path).detach() for place in where])
                turned = joined.roll(len(joined) // 2, 0) if where[0].halves else joined
                state[f"{original}.weight"] = turned.clone()
    assert len(state) > 5
    for key, value in CONVERTERS[name](state).items():
        torch.testing.assert_close(value, network.get_parameter(key).detach(), rtol=0, atol=0)
