"""Per-example gradients of every layer type, against autograd one example at a time."""

import pytest
import torch
from fuzz import longer, note
from hypothesis import given, strategies as st
from oracle import captured, check, error, one_at_a_time, square
from torch import nn

from dmin.gradients.factors import Correlation, Dense, Outer, Rows, Sum
from dmin.gradients.layers import gradient_of, layer_gradient


class Folded(nn.Module):
    """Give a layer its examples' parts as rows of their own, as video and text models do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Resized(nn.Module):
    """A transposed convolution asked for a size, which overrides its output_padding."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(2, 3, 3, stride=2)

    def forward(self, x):
        return self.layer(x, output_size=(2 * x.shape[-2] + 2, 2 * x.shape[-1] + 2))


class Unused(nn.Module):
    """Calls layers and drops what they return, once out of twice and altogether."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.dropped = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        self.dropped(x), self.used(2 * x)
        return self.used(x)


def affine_at_random(network: nn.Module) -> nn.Module:
    """Norm layers start at scale 1 and shift 0, where some mistakes do not show."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0)
    return network


# name -> (the network, the shape of one example)
CASES = {
    "linear, one row": (lambda: nn.Linear(7, 5), (7,)),
    "linear, no bias": (lambda: nn.Linear(7, 5, bias=False), (7,)),
    "linear, tokens": (lambda: nn.Linear(7, 5), (3, 7)),
    "linear, image": (lambda: nn.Linear(7, 5), (3, 4, 7)),
    "linear, folded rows": (lambda: Folded(nn.Linear(7, 5)), (3, 7)),
    "linear, folded tokens": (lambda: Folded(nn.Linear(7, 5)), (3, 4, 7)),
    "linear, twice": (lambda: Twice(nn.Linear(5, 5)), (3, 5)),
    "linear, tied": (Tied, (3, 5)),
    "linear, output unused": (Unused, (4,)),
    "linear, in-place after": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True)), (5,)),
    "linear, deep": (lambda: nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 6)), (5,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "conv1d, groups, stride": (lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2), (4, 9)),
    "conv1d, even same": (lambda: nn.Conv1d(2, 3, 4, padding="same"), (2, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 6, 7)),
    "conv2d, no bias, 1×1": (lambda: nn.Conv2d(3, 5, 1, bias=False), (3, 6, 7)),
    "conv2d, large map": (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 17, 18)),
    "conv2d, stride": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (3, 8, 7)),
    "conv2d, stride leaves a rest": (lambda: nn.Conv2d(3, 5, 3, stride=3), (3, 10, 8)),
    "conv2d, dilation": (lambda: nn.Conv2d(3, 5, (3, 2), dilation=(1, 2)), (3, 8, 7)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 6, 7)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 6, 7)),
    "conv2d, same": (lambda: nn.Conv2d(3, 5, (4, 3), padding="same", dilation=(1, 2)), (3, 6, 7)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 5, 3, padding="valid"), (3, 6, 7)),
    "conv2d, folded": (lambda: Folded(nn.Conv2d(3, 5, 3, padding=1)), (2, 3, 5, 6)),
    "conv2d, twice": (lambda: Twice(nn.Conv2d(3, 3, 3, padding=1)), (3, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, stride=(1, 2, 1), padding=1), (2, 4, 5, 3)),
    "conv3d, groups, large": (lambda: nn.Conv3d(2, 4, 3, groups=2, padding=1), (2, 7, 7, 7)),
    "transposed 1d": (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2),
        (4, 5),
    ),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1), (3, 5, 6)),
    "transposed 2d, output padding, dilation": (
        lambda: nn.ConvTranspose2d(2, 4, 3, stride=3, output_padding=(1, 2), dilation=2),
        (2, 4, 3),
    ),
    "transposed 2d, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 4, 5)),
    "transposed 2d, output size": (Resized, (2, 4, 5)),
    "transposed 3d": (
        lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, output_padding=1),
        (2, 3, 2, 3),
    ),
    "group norm": (lambda: nn.GroupNorm(2, 6), (6, 4, 5)),
    "group norm, rows": (lambda: nn.GroupNorm(2, 6, eps=1e-2), (6,)),
    "group norm, folded": (lambda: Folded(nn.GroupNorm(2, 6)), (3, 6, 4)),
    "layer norm": (lambda: nn.LayerNorm(6), (4, 6)),
    "layer norm, rows": (lambda: nn.LayerNorm(6, eps=1e-2), (6,)),
    "layer norm, several dimensions": (lambda: nn.LayerNorm((3, 4, 5)), (3, 4, 5)),
    "layer norm, tokens of several dimensions": (lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    "layer norm, no bias": (lambda: nn.LayerNorm(6, bias=False), (4, 6)),
    "layer norm, no affine": (
        lambda: nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 3)),
        (4, 6),
    ),
    "layer norm, folded": (lambda: Folded(nn.LayerNorm(6)), (3, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (4, 6)),
    "rms norm, eps": (lambda: nn.RMSNorm((2, 6), eps=1e-2), (3, 2, 6)),
}
PADDING = ["zeros", "circular", "reflect", "replicate"]
CASES |= {
    f"conv{n}d, {mode} {padding}": (
        lambda n=n, mode=mode, padding=padding: getattr(nn, f"Conv{n}d")(
            2, 3, 3, padding=padding, padding_mode=mode, dilation=2 if padding == "same" else 1
        ),
        (2, *(6, 7, 5)[:n]),
    )
    for n in (1, 2, 3)
    for mode in PADDING
    for padding in (2, "same")
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CASES)
def test_layers_agree_with_autograd(case, dtype):
    torch.manual_seed(0)
    build, shape = CASES[case]
    network = affine_at_random(build()).to(dtype)
    x = torch.randn(4, *shape, dtype=dtype)
    found = check(network, {list_arguments(network)[0]: x})
    assert set(found) == {name for name, _ in network.named_parameters()}


def list_arguments(network):
    import inspect

    return [name for name in inspect.signature(network.forward).parameters if name != "self"]


class Words(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.words, self.head = layer, nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.words(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 2, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 1}, {"sparse": True}, {"scale_grad_by_freq": True}],
    ids=str,
)
def test_embeddings_agree_with_autograd(options, shape, dtype):
    torch.manual_seed(0)
    network = Words(nn.Embedding(5, 4, **options)).to(dtype)
    check(network, {"x": torch.randint(5, shape)})


convolutions = st.fixed_dictionaries(
    {
        "dimensions": st.integers(1, 3),
        "transposed": st.booleans(),
        "groups": st.integers(1, 3),
        "kernel": st.integers(1, 3),
        "stride": st.integers(1, 3),
        "dilation": st.integers(1, 2),
        "padding": st.integers(0, 2),
        "mode": st.sampled_from(PADDING),
        "bias": st.booleans(),
        "size": st.integers(5, 8),
        "batch": st.integers(1, 3),
        "seed": st.integers(0, 2**16),
    }
)


@longer(60)
@given(convolutions)
def test_any_convolution_agrees_with_autograd(c):
    torch.manual_seed(c["seed"])
    options = {name: c[name] for name in ("groups", "stride", "dilation", "padding", "bias")}
    if c["transposed"]:
        options["output_padding"] = min(c["padding"], max(c["stride"], c["dilation"]) - 1)
        kind = f"ConvTranspose{c['dimensions']}d"
    else:
        options["padding_mode"] = c["mode"]
        kind = f"Conv{c['dimensions']}d"
    layer = getattr(nn, kind)(2 * c["groups"], 3 * c["groups"], c["kernel"], **options).double()
    x = torch.randn(c["batch"], 2 * c["groups"], *[c["size"]] * c["dimensions"]).double()
    check(layer, {"input": x})
    note("convolutions, float64", "right")


@longer(40)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    positions=st.lists(st.integers(1, 4), max_size=3),
    batch=st.integers(1, 4),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_linear_agrees_with_autograd(sizes, positions, batch, bias, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(*sizes, bias=bias).double()
    check(layer, {"input": torch.randn(batch, *positions, sizes[0]).double()})
    note("linear layers, float64", "right")


def test_both_ways_through_a_convolution_are_taken(monkeypatch):
    """The table above has maps on both sides of the switch, and both sides agree."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 9, 9)
    unfolded = captured(layer, {"input": x})
    monkeypatch.setattr(Correlation, "UNFOLD_POSITIONS", 0)
    calls = []
    backward = torch.ops.aten.convolution_backward
    monkeypatch.setattr(
        torch.ops.aten, "convolution_backward", lambda *a: calls.append(1) or backward(*a)
    )
    assert error(captured(layer, {"input": x}), unfolded) <= 1e-5
    assert len(calls) == 2


def test_bfloat16_is_as_good_as_bfloat16():
    """Sums are taken in float32: the error is that of the operands, 2⁻⁸, not of their sum."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3)
    )
    x = torch.randn(3, 3, 16, 16)
    truth = one_at_a_time(network, {"input": x}, square, 3)
    found = captured(network.bfloat16(), {"input": x.bfloat16()})
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert error(found, truth) <= 0.03


def test_rms_norm_takes_the_default_eps_of_its_dtype():
    torch.manual_seed(0)
    layer, x = nn.RMSNorm(8).bfloat16(), 1e-2 * torch.randn(4, 3, 8).bfloat16()
    truth = one_at_a_time(layer, {"x": x}, square, 4)
    assert error(captured(layer, {"x": x}), truth) <= 0.03


def test_a_subclass_with_its_own_forward_is_another_layer():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Renamed(nn.Linear):
        pass

    assert layer_gradient(Scaled(2, 2)) is None
    assert layer_gradient(Renamed(2, 2)) is layer_gradient(nn.Linear(2, 2))


def test_a_registered_function_serves_its_type():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6))

        def forward(self, x):
            return x * self.weight

    @gradient_of(Scale)
    def _scale(layer, a, d, batch):
        return {"weight": Dense((a * d).sum(1))}

    torch.manual_seed(0)
    check(nn.Sequential(Scale(), nn.Linear(6, 2)), {"input": torch.randn(3, 4, 6)})


FACTORS = {
    "dense": Dense(torch.randn(5, 3, 4)),
    "outer": Outer(torch.randn(5, 2, 3), torch.randn(5, 2, 4)),
    "correlation": Correlation(
        torch.randn(5, 3, 4, 4), torch.randn(5, 2, 6, 6), nn.Conv2d(2, 3, 3), (0, 0)
    ),
    "rows": Rows(torch.randn(5, 2, 3), torch.randint(4, (5, 2)), 4),
}
FACTORS["sum"] = Sum([FACTORS["dense"], FACTORS["outer"]])


@pytest.mark.parametrize("kind", FACTORS)
def test_factors_are_cut_by_example_and_their_numbers_are_fresh(kind):
    factors = FACTORS[kind]
    whole = factors.dense().clone()
    assert len(whole) == factors.batch == 5
    torch.testing.assert_close(factors[1:3].dense(), whole[1:3])
    assert factors[1:3].batch == 2
    factors.dense().zero_()  # callers work in place
    torch.testing.assert_close(factors.dense(), whole)
