"""Tensors that a network computed from its parameters before a pass."""

import pytest
import torch
from torch import nn

from dmin import BlockCyclic
from dmin.collect.guard import Guard
from dmin.diffusion import Stratified
from dmin.runtime.errors import DminError
from tests.collect.test_guard import WIDTH, Denoiser, GradientCollector, Tokens


class Keeps(Tokens):
    """Multiplies by four rows of a weight that it took when it was built."""

    def __init__(self, take):
        super().__init__()
        self.c = nn.Linear(8, 8)
        take(self)

    def between(self, h):
        return h + self.c(h) + h @ self.taken().T.repeat(1, 2)


def view(network):
    network.w = network.c.weight[:4]
    network.taken = lambda: network.w


def in_a_list(network):
    network.rows = {"a": [network.c.weight[:4]]}
    network.taken = lambda: network.rows["a"][0]


def computed(network):
    network.w = torch.cat([network.c.weight[:2], network.c.weight[4:6]])
    network.taken = lambda: network.w


def buffer(network):
    network.register_buffer("w", 2 * network.c.weight[:4])
    network.taken = lambda: network.w


def without_gradients(network):
    with torch.no_grad():
        view(network)


def constant(network):
    network.w = network.c.weight[:4].detach()
    network.taken = lambda: network.w


def in_forward(network):
    network.taken = lambda: network.c.weight[:4]


def normalised(network):
    network.d = torch.nn.utils.weight_norm(nn.Linear(8, 4))  # remakes its weight in each pass
    network.taken = lambda: (network.d(torch.eye(8)) - network.d.bias).T


def check(take, loaded, frozen, params="all"):
    model = Denoiser(lambda: Keeps(take))
    if loaded:
        weights = {k: v + 0.5 for k, v in model.network.state_dict().items()}
        model.network.load_state_dict(weights)
    model.network.requires_grad_(not frozen)
    collector = GradientCollector(model, BlockCyclic(64, block=16), Stratified(4), params=params)
    images = torch.rand(8, 1, 8, WIDTH, generator=torch.Generator().manual_seed(0))
    batch = collector.inputs(images, {}, [f"x{i}" for i in range(8)]).all()
    Guard(collector, collector.ownership).run(batch)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("take", [view, in_a_list, computed, buffer, without_gradients])
def test_a_tensor_computed_from_a_parameter_before_the_pass_is_refused(take, loaded, frozen):
    if take is without_gradients and loaded:
        pytest.skip("torch itself refuses it then")
    with pytest.raises(DminError, match=r"computed from its parameters.*c\.weight.*in forward"):
        check(take, loaded, frozen)


@pytest.mark.parametrize("take", [constant, in_forward, normalised])
def test_constants_and_what_each_pass_computes_are_not(take):
    check(take, True, False)


def test_of_a_parameter_that_is_not_attributed_it_is_a_constant():
    check(view, True, False, params=r"^(a|b)\.")
