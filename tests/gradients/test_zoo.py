"""A zoo of networks drawn at random: whatever they do with their examples, nothing is left out."""

import pytest
import torch
import torch.nn.functional as F
from fuzz import longer, note
from oracle import Keep, settled
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmin.gradients.ownership import Ownership
from dmin.gradients.parameters import choose_parameters

pytest.importorskip("hypothesis")
from hypothesis import given, strategies as st

WIDTH, TOKENS = 4, 4


class Channels(nn.Module):
    """A layer that takes channels before places."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(-1, -2)).transpose(-1, -2)


class Attention(nn.Module):
    """Its projections' weights are used by a parent that never calls them."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Written(nn.Module):
    """A parameter that is written into a tensor."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        y = x.clone()
        y[..., 0, :] = self.token
        return x + y


class Shared(nn.Module):
    """Learned tokens through a layer: as many as tokens, and maybe as examples."""

    def __init__(self):
        super().__init__()
        self.tokens, self.mix = nn.Parameter(torch.randn(TOKENS, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.mix(x) + self.mix(self.tokens).mean(0)


LAYERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "convolution": lambda: Channels(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "group norm": lambda: Channels(nn.GroupNorm(2, WIDTH)),
    "attention": Attention,
    "written": Written,
    "shared": Shared,
}
# Layers that take a token by itself, so that examples may have tokens of any number.
BY_TOKEN = ["linear", "layer norm", "rms norm"]


def lengths(count):
    return [1 + i % TOKENS for i in range(count)]


def packed(layer, x):
    parts = [each[:n] for each, n in zip(x, lengths(len(x)), strict=True)]
    out = layer(torch.cat(parts)).split(lengths(len(x)))
    return torch.stack([F.pad(each, (0, 0, 0, TOKENS - len(each))) for each in out])


def listed(layer, x):
    parts = [layer(each[:n]) for each, n in zip(x, lengths(len(x)), strict=True)]
    return torch.stack([F.pad(each, (0, 0, 0, TOKENS - len(each))) for each in parts])


def ordered(layer, x):
    order = x[:, 0, 0].argsort()
    return layer(x[order])[order.argsort()]


def gathered(layer, x):
    """Takes the tokens that their numbers choose, all examples' together."""
    flat = x.reshape(-1, WIDTH)
    index = (flat.sum(1) > 0).nonzero()[:, 0]
    return torch.zeros_like(flat).index_add(0, index, layer(flat[index])).view_as(x)


LAYOUTS = {
    "by example": lambda layer, x: layer(x),
    "sequence first": lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1),
    "doubled": lambda layer, x: sum(layer(torch.cat([x, -x])).chunk(2)),
    "reversed": lambda layer, x: layer(x.flip(0)).flip(0),
    "one by one": lambda layer, x: torch.cat([layer(each[None]) for each in x]),
    "packed": packed,
    "listed": listed,
    "ordered by data": ordered,
    "gathered by data": gathered,
}
ANY_LAYER = ["by example", "doubled", "reversed", "one by one", "ordered by data"]
HOOKS = {
    "none": lambda layer: None,
    "output": lambda layer: layer.register_forward_hook(lambda module, inputs, out: 2 * out),
    "input": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: 2 * inputs[0]),
    "forward": lambda layer: setattr(layer, "forward", lambda x, f=layer.forward: f(2 * x)),
    "compiled": lambda layer: layer.compile(backend="eager"),
}


class Stage(nn.Module):
    def __init__(self, layer, layout, hook, recomputed):
        super().__init__()
        self.layer = LAYERS[layer]()
        HOOKS[hook](self.layer)
        self.layout, self.recomputed = LAYOUTS[layout], recomputed

    def forward(self, x):
        if self.recomputed:
            return checkpoint(self.layout, self.layer, x, use_reentrant=False)
        return self.layout(self.layer, x)


class Network(nn.Module):
    def __init__(self, stages):
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x):
        for stage in self.stages:
            x = x + torch.tanh(stage(x))
        return x


def stages():
    hooks, recomputed = st.sampled_from(sorted(HOOKS)), st.booleans()
    by_token = st.builds(
        Stage, st.sampled_from(BY_TOKEN), st.sampled_from(sorted(LAYOUTS)), hooks, recomputed
    )
    any_layer = st.builds(
        Stage, st.sampled_from(sorted(LAYERS)), st.sampled_from(ANY_LAYER), hooks, recomputed
    )
    return st.lists(st.one_of(by_token, any_layer), min_size=1, max_size=3)


def loss(network, x):
    output = network(x)
    output = output if output.dtype == torch.float64 else output.float()
    return (output - torch.linspace(-1, 2, WIDTH).to(output)).flatten(1).square().mean(1)


def by_autograd(network, x):
    """The gradient of each example's loss, by one backward pass each over the whole batch."""
    named = dict(network.named_parameters())
    rows = [
        torch.autograd.grad(value, named.values(), retain_graph=True, allow_unused=True)
        for value in loss(network, x)
    ]
    return {
        name: torch.stack([torch.zeros_like(p) if row[i] is None else row[i] for row in rows])
        for i, (name, p) in enumerate(named.items())
    }


@longer(40)
@given(
    made=stages(),
    batch=st.sampled_from([1, 3, 4, 16, 64]),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_network_gives_each_example_its_own_gradient(made, batch, dtype, seed):
    torch.manual_seed(seed)
    network, ownership = Network(made).to(dtype).eval(), Ownership()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn_like(p) / 2)
    ownership.expect(batch, (TOKENS, WIDTH))
    for _ in range(2):
        x = torch.randn(batch, TOKENS, WIDTH, dtype=dtype)
        found = settled(
            network,
            Keep(choose_parameters(network)),
            lambda capture, x=x: capture.backward(loss(network, x)),
            ownership=ownership,
        )
        truth = by_autograd(network, x)
        zeros = {name: torch.zeros_like(g) for name, g in truth.items() if name not in found}
        ours, true = (
            torch.cat([g[name].double().flatten(1) for name in truth], 1)
            for g in (found | zeros, truth)
        )
        # Autograd adds up in bfloat16; a wrong example is off by the whole length. What cancels
        # leaves rounding alone.
        limit, rounding = (1e-10, 1e-12) if dtype == torch.float64 else (0.1, 1e-5)
        length = true.norm(dim=1) + rounding / limit
        error = float(((ours - true).norm(dim=1) / length).max())
        assert error <= limit
        note(f"networks, {str(dtype)[6:]}, passes of {batch:2}", "right", error=error)
