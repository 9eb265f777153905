"""The guard of a collection: each row is its own example's gradient, or is refused by name."""

import random

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
    """Dropout that stays on in eval mode: each example is seen through other numbers."""

    def between(self, h):
        return nn.functional.dropout(h, 0.5)


class RandomOfPython(Tokens):
    """Skips a layer now and then, by a number that the next pass draws anew."""

    def between(self, h):
        return h + self.b(h).detach().mean() * (random.random() < 0.5)


class RandomOfNumPy(Tokens):
    def between(self, h):
        return h * float(np.random.rand() < 2)


class OwnNumbers(Tokens):
    """The remedy: numbers of its own, the same for all."""

    def between(self, h):
        generator = torch.Generator().manual_seed(0)
        return h + 0.1 * torch.randn(h.shape[1:], generator=generator)


class Places(Tokens):
    """Makes something else of an example by its place in the pass."""

    def between(self, h):
        return h * self.factor(torch.arange(len(h)), len(h))[:, None, None]


class FirstIsSpecial(Places):
    def factor(self, place, count):
        return 1.0 + (place == 0)


class EvenIsSpecial(Places):
    def factor(self, place, count):
        return 1.0 + place % 2


class OneIsSpecial(Places):
    """One of the places alone, and not the one whose pair is computed by itself."""

    def factor(self, place, count):
        return 1.0 + (place == count - 2)


class TableByPlace(Tokens):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 1, 8))

    def between(self, h):
        return h + self.table[: len(h)]


class SeesThoseBefore(Tokens):
    """Examples see those before them, without a gradient."""

    def between(self, h):
        return h + 0.1 * (h.detach().cumsum(0) - h.detach())


class SeesThoseBehind(Tokens):
    def between(self, h):
        return h + 0.1 * (h.detach().flip(0).cumsum(0).flip(0) - h.detach())


class SeesOne(Tokens):
    """One example sees its neighbour."""

    def between(self, h):
        return torch.cat([h[:1], h[1:-1], h[-1:] + h[-2:-1].detach()]) if len(h) > 1 else h


class AddsToTheLast(Tokens):
    """Keeps what a pass computed for the next, as caches of features do."""

    kept = None

    def between(self, h):
        last, self.kept = self.kept, h.detach()
        return h if last is None or last.shape != h.shape else h + last


class Averages(Tokens):
    """A running average in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def between(self, h):
        self.mean.lerp_(h.detach().mean((0, 1)), 0.1)
        return h - self.mean


class Counts(Tokens):
    """Changes what it holds, though no gradient depends on that."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def between(self, h):
        self.passes += 1
        return h


class Renormalises(Tokens):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 8, max_norm=0.5)

    def between(self, h):
        return h + self.table(torch.arange(8))


class RemadeTable(Tokens):
    """A table that is made at its first use is no state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(0))

    def between(self, h):
        self.table = torch.linspace(0, 1, 8)
        return h * self.table


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
    with pytest.raises(DminError, match=r"mixes the examples.*behind a\..*collect\.microbatch=1"):
        collect(BatchStatistics, tmp_path / "s", 4)


def test_a_decision_over_the_whole_batch_is_refused(tmp_path):
    with pytest.raises(DminError, match=r"over the whole batch.*collect\.microbatch=1"):
        collect(WholeBatchDecision, tmp_path / "s", 16)


@pytest.mark.parametrize("microbatch", [4, 16])
def test_an_order_that_changes_from_run_to_run_is_refused(microbatch, tmp_path):
    told = r"different gradients when it is run again|cannot be determined"
    with pytest.raises(DminError, match=told):
        collect(Counting, tmp_path / "s", microbatch)


BY_PLACE = [FirstIsSpecial, EvenIsSpecial, OneIsSpecial, TableByPlace]


@pytest.mark.parametrize("microbatch", [2, 3, 4, 16, 64])
@pytest.mark.parametrize("network", [*BY_PLACE, SeesThoseBefore, SeesThoseBehind, SeesOne])
def test_what_is_made_of_an_example_by_its_place_or_neighbours_is_refused(
    network, microbatch, tmp_path
):
    images = torch.rand(16, 1, 8, WIDTH, generator=torch.Generator().manual_seed(0))
    collector = GradientCollector(Denoiser(network), BlockCyclic(64, block=16), Stratified(4))
    guard = Guard(collector, collector.ownership)
    batch = collector.inputs(images, {}, [f"x{i}" for i in range(16)]).all()
    with pytest.raises(DminError, match=r"(its position|their position).*collect\.microbatch=1"):
        guard.run(batch.rows(slice(0, microbatch)))
    guard.run(batch.rows(slice(0, 1)))


@pytest.mark.parametrize("microbatch", [1, 16])
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (AddsToTheLast, "keeps a state between passes"),
        (RandomOfPython, "draws random numbers"),
        (RandomOfNumPy, "draws random numbers"),
        (Random, r"draws random numbers.*eval mode.*torch\.Generator"),
        (Averages, "changes its own parameters or buffers: mean"),
        (Counts, "changes its own parameters or buffers: passes"),
        (Renormalises, r"own parameters or buffers: table\.weight.*max_norm"),
    ],
)
def test_a_network_that_is_another_after_a_pass_is_refused(network, message, microbatch, tmp_path):
    images = torch.rand(8, 1, 8, WIDTH, generator=torch.Generator().manual_seed(0))
    model = Denoiser(network)
    collector = GradientCollector(model, BlockCyclic(64, block=16), Stratified(4))
    before = {name: value.clone() for name, value in model.network.named_buffers()}
    guard = Guard(collector, collector.ownership)
    batch = collector.inputs(images, {}, [f"x{i}" for i in range(8)]).all()
    with pytest.raises(DminError, match=message):
        guard.run(batch.rows(slice(0, microbatch)))
    for name, value in model.network.named_buffers():
        assert torch.equal(value, before[name])


def renormalised():
    network = Renormalises()
    network.table(torch.arange(8))
    network.table.max_norm = None
    return network


@pytest.mark.parametrize("network", [OwnNumbers, renormalised, RemadeTable])
def test_a_network_that_does_the_same_each_time_passes(network, tmp_path):
    assert collect(network, tmp_path / "s", 16).complete


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


def test_rows_that_only_the_kernels_make_nan_are_refused_as_theirs(tmp_path, monkeypatch):
    """Autograd's gradient is finite: neither the example is at fault nor the weights."""
    run = GradientCollector.run

    def broken(self, *args, **settings):
        found = run(self, *args, **settings)
        found.values["loss"][:] = torch.nan
        return found

    monkeypatch.setattr(GradientCollector, "run", broken)
    with pytest.raises(DminError, match=r"not the BlockCyclic of .*collect\.kernels=torch"):
        collect(Tokens, tmp_path / "s", 16)


def test_a_buffer_of_nan_that_stays_is_unchanged(tmp_path):
    def network():
        made = Tokens()
        made.register_buffer("unused", torch.full((3,), torch.nan))
        return made

    assert collect(network, tmp_path / "s", 16).complete
