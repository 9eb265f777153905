"""Networks drawn at random: whatever stands in one, each example's gradients are autograd's."""

import pytest
import torch
from fuzz import longer, note
from oracle import check
from torch import nn

pytest.importorskip("hypothesis")
from hypothesis import given, strategies as st


class Tokens(nn.Module):
    """A layer over channels, used on images."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Its projections' weights are used by a parent that never calls them."""

    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        mixed = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return x + mixed.transpose(1, 2).reshape(x.shape)


class Table(nn.Module):
    """Bare parameters, one of them as large as an image."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width, 1, 1))
        self.shift = nn.Parameter(torch.randn(width, 8, 8))

    def forward(self, x):
        return x * self.scale + self.shift


def twice(width):
    layer = nn.Conv2d(width, width, 3, padding=1)
    return [layer, nn.SiLU(), layer]


def tied(width):
    first, second = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
    second.weight = first.weight
    return [first, nn.Tanh(), second]


PARTS = {
    "group norm": lambda width: [nn.GroupNorm(2, width)],
    "dilated": lambda width: [nn.Conv2d(width, width, 3, padding="same", dilation=2, bias=False)],
    "depthwise": lambda width: [nn.Conv2d(width, width, 3, padding=1, groups=width)],
    "down and up": lambda width: [
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
    ],
    "layer norm": lambda width: [Tokens(nn.LayerNorm(width))],
    "rms norm": lambda width: [Tokens(nn.RMSNorm(width))],
    "linear": lambda width: [Tokens(nn.Linear(width, width)), nn.GELU()],
    "attention": lambda width: [Attention(width)],
    "table": lambda width: [Table(width)],
    "frozen": lambda width: [nn.Conv2d(width, width, 1).requires_grad_(False), nn.SiLU()],
    "twice": twice,
    "tied": tied,
}


class Network(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


@longer(25)
@given(
    parts=st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=5),
    width=st.sampled_from([4, 8]),
    padding=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    batch=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_any_network_agrees_with_autograd(parts, width, padding, batch, seed):
    torch.manual_seed(seed)
    first = nn.Conv2d(3, width, 3, padding=1, padding_mode=padding)
    network = Network([first, *(layer for part in parts for layer in PARTS[part](width))])
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    params = "|".join(f"^{name}$".replace(".", r"\.") for name in sorted(trained))
    check(network.double(), {"x": torch.randn(batch, 3, 8, 8, dtype=torch.float64)}, params=params)
    note("chains of layers, float64", "right")
