"""The guard of a collection: what is not each example's own gradient is refused, by name."""

import numpy as np
import pytest
import torch
from torch import nn

from dmin import DiffusionModel, Example, Examples, GradientCollector, Prediction
from dmin.collect import predict_trainer
from dmin.diffusion import Stratified
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic

WIDTH = 6


class Denoiser(DiffusionModel):
    """Predicts the noise of images ``[1, 8, 6]``, taken as eight tokens of six numbers."""

    ladder = range(9, -1, -1)

    def __init__(self, network):
        super().__init__()
        torch.manual_seed(0)
        self.network = network().eval()

    def predict(self, x0, noise, t, condition):
        noised = x0 + (1 + t / 10)[:, None, None, None] * noise
        prediction = self.network(noised[:, 0])
        return Prediction(prediction.flatten(1), noise.flatten(1), torch.ones(len(x0)))


class Tokens(nn.Module):
    """Two layers, something between them, and a way to lay the tokens out."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x):
        return self.b(self.between(torch.tanh(self.a(x))))

    def between(self, h):
        return h


class SequenceFirst(Tokens):
    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)

    def between(self, h):
        return h.cumsum(0)


class Transformer(Tokens):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(self.b(self.a(x)).transpose(0, 1)).transpose(0, 1)


class BatchStatistics(Tokens):
    def between(self, h):
        return (h - h.mean(0)) / (h.std(0, correction=0) + 0.1)


class WholeBatchDecision(Tokens):
    def between(self, h):
        return h * (2.0 if len(h) > 1 else 1.0)


class Assigned(Tokens):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(8))

    def between(self, h):
        h = h.clone()
        h[:, 0] = self.token
        return h


class Hooked(Tokens):
    def __init__(self):
        super().__init__()
        self.a.register_forward_hook(lambda module, inputs, output: 3 * output)


class Random(Tokens):
    """Draws random numbers, which the guard must draw alike and not use up."""

    def between(self, h):
        return h + 0.1 * torch.randn_like(h)


def collect(network, path, microbatch, count=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 8, WIDTH, generator=generator)
    data = Examples([Example(f"x{i}", x, 0, "") for i, x in enumerate(images)])
    collector = GradientCollector(
        Denoiser(network), BlockCyclic(64, block=16), Stratified(4), microbatch=microbatch
    )
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    return collector.collect(data, path, trainer=trainer, block_size=16, dtype="float32")


WRONG = [SequenceFirst, Transformer, BatchStatistics]


@pytest.mark.parametrize("network", WRONG)
def test_examples_that_are_mixed_are_refused_by_layer(network, tmp_path):
    with pytest.raises(DminError, match=r"(weight|bias).*collect\.microbatch=1"):
        collect(network, tmp_path / "s", 4)


@pytest.mark.slow
@pytest.mark.parametrize("network", [*WRONG, WholeBatchDecision, Tokens])
def test_a_row_is_its_own_examples_or_refused(network, tmp_path):
    alone = collect(network, tmp_path / "1", 1).features("loss")
    for microbatch in (3, 4, 5, 8, 16, 64):
        try:
            found = collect(network, tmp_path / str(microbatch), microbatch)
        except DminError as error:
            assert "collect.microbatch=1" in str(error)
        else:
            assert np.abs(found.features("loss") - alone).max() < 1e-4, microbatch


@pytest.mark.parametrize("network", [*WRONG, WholeBatchDecision])
def test_the_remedy_works(network, tmp_path):
    assert collect(network, tmp_path / "s", 1, count=2).complete


def test_a_decision_over_the_whole_batch_is_refused(tmp_path):
    with pytest.raises(DminError, match=r"over the whole batch.*collect\.microbatch=1"):
        collect(WholeBatchDecision, tmp_path / "s", 16)


@pytest.mark.parametrize(("network", "name"), [(Assigned, "token"), (Hooked, r"a\.weight")])
@pytest.mark.parametrize("microbatch", [1, 16])
def test_what_autograd_sees_and_hooks_do_not_is_refused(network, name, microbatch, tmp_path):
    with pytest.raises(DminError, match=rf"not autograd's.*{name}"):
        collect(network, tmp_path / "s", microbatch)


def test_compiled_code_is_refused(tmp_path):
    def compiled():
        network = Tokens()
        network.compile(backend="eager")
        return network

    with pytest.raises(DminError, match=r"compiled code"):
        collect(compiled, tmp_path / "s", 16)


@pytest.mark.parametrize("microbatch", [1, 5, 64])
def test_right_networks_pass(microbatch, tmp_path):
    assert collect(Tokens, tmp_path / "s", microbatch).complete


def test_random_numbers_are_drawn_alike_and_not_used_up(tmp_path):
    torch.manual_seed(1)
    first = collect(Random, tmp_path / "a", 64)
    torch.manual_seed(1)
    network, store = Denoiser(Random), collect(Random, tmp_path / "b", 64)
    assert network is not None and store.digest() == first.digest()
