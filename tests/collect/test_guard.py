"""The guard of a collection: each row is its own example's gradient, or is refused by name."""

import numpy as np
import pytest
import torch
from torch import nn

from dmin import DiffusionModel, Example, Examples, GradientCollector, Prediction
from dmin.collect import predict_trainer
from dmin.collect.guard import Guard
from dmin.diffusion import Stratified
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic

WIDTH = 6


class Denoiser(DiffusionModel):
    """Predicts the noise of images ``[1, 8, 6]``, taken as eight tokens of six numbers."""

    timesteps = range(9, -1, -1)

    def __init__(self, network):
        super().__init__()
        torch.manual_seed(0)
        self.network = network().eval()

    def predict(self, x0, noise, t, condition):
        noised = x0 + (1 + t / 10).to(x0)[:, None, None, None] * noise
        self.network.clean = x0
        if hasattr(self.network, "t"):
            self.network.t = float(t[0])
        prediction = self.network(noised[:, 0])
        return Prediction(prediction.flatten(1), noise.flatten(1), torch.ones(len(x0)).to(x0))


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


def collect(network, path, microbatch, count=16, first=1.0):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 8, WIDTH, generator=generator)
    images[0] *= first
    data = Examples([Example(f"x{i}", x, 0, "") for i, x in enumerate(images)])
    collector = GradientCollector(
        Denoiser(network), BlockCyclic(64, block=16), Stratified(4), microbatch=microbatch
    )
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    return collector.collect(data, path, trainer=trainer, block_size=16, dtype="float32")


class Routed(Tokens):
    """Orders its examples by what stands in them."""

    def forward(self, x):
        order = x[:, 0, 0].argsort()
        return super().forward(x[order])[order.argsort()]


class Unseen(Tokens):
    """A parameter in code that no hook sees: only autograd knows of it."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))
        self.held = [self.gain]

    def between(self, h):
        with torch._C.DisableTorchFunctionSubclass():
            return h * self.held[0]


class Sleeping(Tokens):
    """What no hook sees decides all but the first example, which none of it decides."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        first = (self.clean.amax((2, 3)) == -1).to(x)[..., None]
        with torch._C.DisableTorchFunctionSubclass():
            unseen = super().forward(x)
        return first * self.seen(x) + (1 - first) * unseen


class Counting(Tokens):
    """Lays all but the first example out otherwise from one run to the next."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        order = [0, *range(1, len(x))[:: 1 if self.runs % 2 else -1]]
        back = sorted(range(len(x)), key=order.__getitem__)
        return super().forward(x[order])[back]


class TwoNetworks(nn.Module):
    """One for early timesteps, and one for late ones, in which the batch decides."""

    t = 0.0

    def __init__(self):
        super().__init__()
        self.early, self.late = Tokens(), WholeBatchDecision()

    def forward(self, x):
        return self.early(x) if self.t < 3 else self.late(x)


class Custom(Tokens):
    """A derivative of its own, which is not that of what it computes."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, d):
            return 2 * d

    def between(self, h):
        return self.Double.apply(h)


EXACT = [SequenceFirst, Transformer, Routed, Assigned, Hooked, Unseen, Custom]


@pytest.mark.parametrize("network", EXACT)
def test_a_row_does_not_depend_on_the_size_of_a_pass(network, tmp_path):
    """With one pair a pass there is nothing to mix; the remainders are sizes of their own."""
    alone = collect(network, tmp_path / "1", 1).features("loss")
    for microbatch in (3, 64, "auto"):
        found = collect(network, tmp_path / str(microbatch), microbatch)
        assert np.abs(found.features("loss") - alone).max() < 1e-4, microbatch


@pytest.mark.parametrize("network", [BatchStatistics, WholeBatchDecision])
def test_the_remedy_works(network, tmp_path):
    assert collect(network, tmp_path / "s", 1, count=2).complete


def test_examples_that_see_each_other_are_refused_by_layer(tmp_path):
    with pytest.raises(DminError, match=r"see each other.*behind a\..*collect\.microbatch=1"):
        collect(BatchStatistics, tmp_path / "s", 4)


def test_a_decision_over_the_whole_batch_is_refused(tmp_path):
    with pytest.raises(DminError, match=r"over the whole batch.*collect\.microbatch=1"):
        collect(WholeBatchDecision, tmp_path / "s", 16)


@pytest.mark.parametrize("microbatch", [4, 16])
def test_an_order_that_changes_from_run_to_run_is_refused(microbatch, tmp_path):
    with pytest.raises(DminError, match=r"(do not scale|cannot be settled).*collect\.microbatch=1"):
        collect(Counting, tmp_path / "s", microbatch)


def test_each_part_of_the_schedule_is_checked(tmp_path):
    """Passes of one size that call other layers are checked by themselves."""
    images = torch.rand(16, 1, 8, WIDTH, generator=torch.Generator().manual_seed(0))
    model = Denoiser(TwoNetworks)
    collector = GradientCollector(model, BlockCyclic(64, block=16), Stratified(4))
    guard = Guard(collector, collector.ownership)
    batch = collector.inputs(images, {}, [f"x{i}" for i in range(16)]).all()
    early, late = (batch.rows(batch.t == t) for t in (min(batch.t), max(batch.t)))
    guard.run(early)
    with pytest.raises(DminError, match="over the whole batch"):
        guard.run(late)


def test_an_example_without_any_gradient_is_held_to_autograd(tmp_path):
    with pytest.raises(DminError, match=r"'x1' has a gradient of zero.*a\.bias, a\.weight"):
        collect(Sleeping, tmp_path / "s", 1, first=0.0)


def test_compiled_code_gives_the_same_rows(tmp_path):
    def compiled():
        network = Tokens()
        network.compile(backend="eager")
        return network

    digests = {collect(each, tmp_path / each.__name__, 16).digest() for each in (compiled, Tokens)}
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scaled_losses_scale_rows_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    model = Denoiser(lambda: Tokens().to(dtype))
    collector = GradientCollector(model, BlockCyclic(64, block=16), Stratified(4))
    x0 = torch.rand(16, 1, 8, WIDTH, generator=generator).to(dtype)
    batch = collector.inputs(x0, {}, [f"x{i}" for i in range(16)]).all()
    plain = collector.run(batch)
    scale = 2.0 ** (torch.randperm(64, generator=generator) % 8)
    scaled = collector.run(batch, scale=scale)
    assert torch.equal(scaled.values["loss"], plain.values["loss"])
    assert torch.equal(scaled.norms["loss"], plain.norms["loss"] * scale[:, None])


@pytest.mark.parametrize("microbatch", [1, 5, 64])
def test_right_networks_pass(microbatch, tmp_path):
    assert collect(Tokens, tmp_path / "s", microbatch).complete


def test_random_numbers_are_drawn_alike_and_not_used_up(tmp_path):
    torch.manual_seed(1)
    first = collect(Random, tmp_path / "a", 64)
    torch.manual_seed(1)
    network, store = Denoiser(Random), collect(Random, tmp_path / "b", 64)
    assert network is not None and store.digest() == first.digest()
