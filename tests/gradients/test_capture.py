"""Capture: every use of a parameter is attributed, and the network is given back untouched."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from oracle import Keep, backward, captured, check, error, one_at_a_time, settled, square
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from dmin.gradients import layers as layer_gradients
from dmin.gradients.factors import Dense
from dmin.gradients.ownership import MAJOR
from dmin.gradients.parameters import choose_parameters
from dmin.gradients.rerun import PerExampleRerun
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic


class Block(nn.Module):
    """A residual block with a table of its own, as PixArt's and Sana's have."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, width))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x, t):
        shift, scale = (self.table[None] + t.reshape(len(x), 2, -1)).chunk(2, dim=1)
        return x + self.linear(self.norm(x) * (1 + scale) + shift)


class Blocks(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.time = nn.Linear(3, 2 * width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, x, t):
        t = self.time(t)
        for block in self.blocks:
            x = block(x, t=t)
        return self.scale * x


def network_and_inputs(batch: int = 4, tokens: int = 5):
    torch.manual_seed(0)
    return Blocks(), {"x": torch.randn(batch, tokens, 6), "t": torch.randn(batch, 3)}


def state_of(network: nn.Module):
    """Everything a capture could leave behind."""
    hooks = [
        [
            len(hooks)
            for key, hooks in sorted(vars(m).items())
            if "hooks" in key and hooks is not None
        ]
        for m in network.modules()
    ]
    parameters = [
        (id(p), type(p), p.requires_grad, p.grad if p.grad is None else p.grad.clone())
        for p in network.parameters()
    ]
    return hooks, parameters, [sorted(vars(m)) for m in network.modules()]


@pytest.mark.parametrize("where", ["nowhere", "forward", "layer", "backward"])
def test_the_network_is_given_back_as_it_was(where):
    network, inputs = network_and_inputs()
    network.blocks[0].linear.weight.requires_grad_(False)
    network.time.register_forward_hook(lambda *_: None)
    before = state_of(network)
    sketch = Keep(choose_parameters(network))
    if where == "layer":
        inputs["t"] = torch.randn(4, 9)
    try:

        def run(capture):
            assert not any(p.requires_grad for p in network.parameters())
            values = square(network, inputs)
            if where == "forward":
                raise KeyboardInterrupt
            capture.backward(values.sum() if where == "backward" else values)

        settled(network, sketch, run)
    except (KeyboardInterrupt, RuntimeError, DminError):
        assert where != "nowhere"
    assert state_of(network) == before


def test_autograd_computes_no_gradients_of_its_own():
    network, inputs = network_and_inputs()
    inputs["x"].requires_grad_(True)
    captured(network, inputs)
    assert inputs["x"].grad is None
    assert all(p.grad is None for p in network.parameters())


def rows_of(network, inputs, loss=square, budget=None):
    sketch = BlockCyclic(dim=64, block=8).bind(choose_parameters(network))
    return backward(network, sketch, lambda: loss(network, inputs), budget)[0]


@pytest.mark.parametrize("budget", [1, 1000, 1 << 40])
def test_rows_do_not_depend_on_the_budget(budget):
    network, inputs = network_and_inputs()
    expected, rows = rows_of(network, inputs), rows_of(network, inputs, budget=budget)
    torch.testing.assert_close(rows.values, expected.values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.squared_norm, expected.squared_norm)


def test_rows_do_not_depend_on_the_batch():
    network, inputs = network_and_inputs()
    expected = rows_of(network, inputs)
    for part in (slice(0, 1), slice(1, 4)):
        rows = rows_of(network, {name: x[part] for name, x in inputs.items()})
        torch.testing.assert_close(rows.values, expected.values[part], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows.squared_norm, expected.squared_norm[part])


def test_rows_are_the_sketch_of_the_gradients():
    network, inputs = network_and_inputs()
    truth = one_at_a_time(network, inputs, square, 4)
    sketch = BlockCyclic(dim=64, block=8).bind(choose_parameters(network))
    rows = rows_of(network, inputs)
    torch.testing.assert_close(rows.values, sketch.of(truth), rtol=1e-4, atol=1e-5)
    norms = sum(g.reshape(4, -1).square().sum(1) for g in truth.values())
    torch.testing.assert_close(rows.squared_norm[:, 0], norms, rtol=1e-5, atol=1e-6)


def test_several_readouts_of_one_forward_pass():
    network, inputs = network_and_inputs()
    readouts = [lambda y: y.flatten(1).square().mean(1), lambda y: y.flatten(1).sin().sum(1)]

    def run(capture):
        y = network(**inputs)
        return capture.backward(readouts[0](y), keep_graph=True), capture.backward(readouts[1](y))

    found = settled(network, Keep(choose_parameters(network)), run)
    for rows, readout in zip(found, readouts, strict=True):
        truth = one_at_a_time(network, inputs, lambda n, i, r=readout: r(n(**i)), 4)
        assert error(rows, truth) <= 1e-5


def test_several_passes_in_one_context_and_several_calls_in_one_pass():
    network, inputs = network_and_inputs()

    def both(network, inputs):
        return square(network, inputs) + square(network, {**inputs, "t": -inputs["t"]})

    truth = one_at_a_time(network, inputs, both, 4)

    def run(capture):
        return [capture.backward(both(network, inputs)) for _ in range(2)]

    for found in settled(network, Keep(choose_parameters(network)), run):
        assert error(found, truth) <= 1e-5


def test_a_pass_that_failed_leaves_no_trace_in_the_next():
    network, inputs = network_and_inputs()
    truth = one_at_a_time(network, inputs, square, 4)

    def run(capture):
        with pytest.raises(RuntimeError, match="shape"):
            network(inputs["x"], torch.randn(4, 9))  # inside `time`
        with pytest.raises(RuntimeError, match="size"):
            network(inputs["x"][..., :4], inputs["t"])  # inside a block
        return capture.backward(square(network, inputs))

    assert error(settled(network, Keep(choose_parameters(network)), run), truth) <= 1e-5


# What no layer's closed form covers, each attributed exactly all the same.


class Passed(nn.Module):
    """Hands a parameter to a child, which computes with it."""

    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x, scale):
            return self.linear(x) * scale

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.child = nn.Parameter(torch.randn(6)), self.Child()

    def forward(self, x):
        return self.child(x, self.scale)


class Borrowed(nn.Module):
    """Calls a layer and also uses its weight without calling it: one use must not hide another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x):
        return self.inner(x) @ self.inner[0].weight


class Tied(nn.Module):
    """The same weight in a layer that is called and in one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return F.linear(torch.tanh(self.a(x)), self.b.weight, self.b.bias)


class Positions(nn.Module):
    """A table of positions, looked up once for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(5, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.mix(x + self.mix(self.table(torch.arange(5))))


class Tree(nn.Module):
    """Takes and returns nested containers; one output does not matter."""

    class Leaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(6) for _ in range(3)])

        def forward(self, parts, *, factor):
            a, b, c = self.weights
            x = parts["x"][0]
            return {"out": (factor * x * a, [x + b]), "unused": x * c, "name": "leaf", "none": None}

    def __init__(self) -> None:
        super().__init__()
        self.leaf = self.Leaf()

    def forward(self, x):
        out = self.leaf({"x": [x, "label"]}, factor=2.0)["out"]
        return out[0] * out[1][0]


class Attention(nn.Module):
    """torch's own attention uses weights and output projection without calling any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)

    def forward(self, x):
        return self.encoder(self.attention(x, x, x)[0])


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 4, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0]


class Normed(nn.Module):
    """A reparametrised weight: computed from parameters by a module that sees no example."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(6, 4))

    def forward(self, x):
        return self.linear(x)


class OldNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with pytest.warns(FutureWarning):
            self.linear = nn.utils.weight_norm(nn.Linear(6, 4))

    def forward(self, x):
        return self.linear(x)


class Function(nn.Module):
    """A custom derivative."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return (x * weight) ** 2

        @staticmethod
        def backward(ctx, d):
            x, weight = ctx.saved_tensors
            slope = 2 * d * x * weight
            return slope * weight, (slope * x).sum((0, 1))

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.Square.apply(self.linear(x), self.weight)


class Conditioned(nn.Module):
    """Half of it idle for some examples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return torch.where(x[:, :1, :1] > 0, x * self.a, x + self.b)


FALLBACKS = {
    kind.__name__: kind
    for kind in [
        *(Passed, Borrowed, Tied, Positions, Tree, Attention),
        *(Sequence, Normed, OldNormed, Function, Conditioned),
    ]
}


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("kind", FALLBACKS)
def test_every_use_is_attributed(kind, budget):
    torch.manual_seed(0)
    network = FALLBACKS[kind]().double().eval()
    inputs = {"x": torch.randn(4, 5, 6).double()}
    truth = one_at_a_time(network, inputs, square, 4)
    sink = Keep(choose_parameters(network))
    found, coverage = backward(network, sink, lambda: square(network, inputs), budget)
    assert error(found, truth) <= 1e-10
    missing = truth.keys() - found.keys()
    assert all(not truth[name].any() for name in missing)
    for name, path in coverage.items():
        assert path == "unused" if name in missing else path != "unused", name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_parameters_of_modules_are_attributed(dtype):
    network, inputs = network_and_inputs()
    found = check(network.to(dtype), {name: x.to(dtype) for name, x in inputs.items()})
    assert set(found) == {name for name, _ in network.named_parameters()}


def test_the_way_of_each_parameter_is_listed():
    network, inputs = network_and_inputs()
    network.idle = nn.Linear(2, 2)

    def run(capture):
        assert set(capture.coverage.values()) == {"unused"}
        capture.backward(square(network, inputs))
        return capture.coverage

    expected = {name: "closed form" for name, _ in network.named_parameters()}
    expected |= {"idle.weight": "unused", "idle.bias": "unused"}
    expected |= {f"blocks.{i}.table": f"per-example rerun (blocks.{i})" for i in range(2)}
    expected["scale"] = "per-example rerun (the network)"
    assert settled(network, Keep(choose_parameters(network)), run) == expected


@pytest.mark.parametrize("tokens", [4, 8])
def test_what_looks_like_a_batch_is_not_taken_for_one(tokens):
    """As many positions as examples: cutting an example out must not cut the table."""

    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6))

        def forward(self, x, table):
            return (x + table) * self.weight

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Rotated()

        def forward(self, x):
            return self.inner(x, torch.arange(6.0 * tokens).view(tokens, 6).sin())

    torch.manual_seed(0)
    check(Network(), {"x": torch.randn(4, tokens, 6)})


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return x * self.weight


class Constant(nn.Module):
    """Layers applied to what all examples share, as DoRA multiplies its factors out."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 3, bias=False), nn.Linear(3, 8, bias=False)
        self.table, self.mix = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)
        self.weighted = Weighted()

    def forward(self, x):
        product = self.up(self.down(torch.eye(8))) + self.weighted(torch.eye(8))
        return x @ product + self.mix(self.table)


class Parts(nn.Module):
    """A folded view of the input, which has no graph either."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(x.view(-1, 8)).view(len(x), -1)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [Constant, Parts])
def test_what_the_batch_happens_to_divide_is_not_taken_for_folded_examples(kind, batch):
    torch.manual_seed(0)
    network, inputs = kind(), {"x": torch.randn(batch, 8, 8)}
    check(network, inputs)
    sink = Keep(choose_parameters(network))
    _, coverage = backward(network, sink, lambda: square(network, inputs))
    closed = [path == "closed form" for path in coverage.values()]
    assert all(closed) if kind is Parts else not any(closed[:3])


def test_a_subset_by_regular_expression():
    network, inputs = network_and_inputs()
    found = check(network, inputs, params=r"blocks\.1\.|^scale$")
    assert set(found) == {name for name in dict(network.named_parameters()) if ".1." in name} | {
        "scale"
    }


class Matrix(nn.Module):
    """Returns bfloat16 under autocast, float32 otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return x @ self.matrix


@pytest.mark.parametrize("kind", [Matrix, Blocks])
def test_bfloat16_autocast(kind):
    network, inputs = network_and_inputs()
    if kind is Matrix:
        network, inputs = Matrix(), {"x": inputs["x"]}
    truth = one_at_a_time(network, inputs, square, 4)

    def loss(network, inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return square(network, inputs)

    assert error(captured(network, inputs, loss), truth) <= 0.03


# Gradient checkpointing.


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(6, 6), nn.ModuleList([Block(), Block()])
        self.scale, self.reentrant = nn.Parameter(torch.randn(6)), reentrant
        self.seen: list[weakref.ref] = []

    def forward(self, x, t):
        x = self.first(x)
        for block in self.blocks:
            block.norm.register_forward_hook(lambda m, a, y: self.seen.append(weakref.ref(y)))
            x = checkpoint(block, x, t, use_reentrant=self.reentrant) * self.scale
        return x


def test_checkpointing_is_exact_and_its_activations_are_not_kept():
    torch.manual_seed(0)
    network = Checkpointed().double()
    inputs = {"x": torch.randn(4, 5, 6).double(), "t": torch.randn(4, 12).double()}
    truth = one_at_a_time(network, inputs, square, 4)
    network.seen.clear()

    def run(capture):
        network.seen.clear()
        values = square(network, inputs)
        assert network.seen and not any(ref() is not None for ref in network.seen)
        return capture.backward(values)

    found = settled(network, Keep(choose_parameters(network)), run)
    assert error(found, truth) <= 1e-10
    assert set(found) == set(truth)


def test_reentrant_checkpointing_is_refused():
    network = Checkpointed(reentrant=True)
    inputs = {"x": torch.randn(4, 5, 6), "t": torch.randn(4, 12)}
    with pytest.raises(DminError, match=r"blocks\.0.* ran without gradients.*use_reentrant=False"):
        captured(network, inputs)


# Memory.


def test_the_whole_gradient_never_exists(monkeypatch):
    live = peak = 0

    def formed(gradient):
        nonlocal live, peak
        live += gradient.nbytes
        peak = max(peak, live)

        def freed(size=gradient.nbytes):
            nonlocal live
            live -= size

        weakref.finalize(gradient, freed)
        return gradient

    for kind in ("Dense", "Outer", "Correlation"):
        factors = getattr(layer_gradients, kind)
        monkeypatch.setattr(factors, "dense", lambda self, d=factors.dense: formed(d(self)))
    network = nn.Sequential(*[nn.Linear(32, 32) for _ in range(12)]).double()
    inputs = {"input": torch.randn(8, 32, dtype=torch.float64)}
    rows_of(network, inputs, budget=2 * 8 * 32 * 32)
    assert live == 0
    assert 8 * 32 * 32 <= peak <= 2 * 8 * 32 * 32  # two examples of one weight, of 8 × 12


class Impatient(Keep):
    """Counts the parameters whose gradients wait while another's are taken."""

    waiting = 0

    def add(self, state, name, factors):
        super().add(state, name, factors)
        self.waiting = max(self.waiting, len(self.capture._pass.arrived))


@pytest.mark.parametrize("kind", [Blocks, Borrowed, lambda: Checkpointed()])
def test_gradients_are_handed_on_as_they_arrive(kind):
    network, (_, inputs) = kind(), network_and_inputs()
    if isinstance(network, Borrowed):
        del inputs["t"]
    elif isinstance(network, Checkpointed):
        inputs["t"] = torch.randn(4, 12)
    sketch = Impatient(choose_parameters(network))

    def run(capture):
        sketch.capture = capture
        values = square(network, inputs)
        capture.backward(values, keep_graph=True)
        capture.backward(values)

    settled(network, sketch, run)
    assert sketch.waiting == 0


def test_gradients_that_exceed_the_budget_are_computed_when_asked_for():
    torch.manual_seed(0)
    matrix, x, d = Matrix(), torch.randn(4, 5, 6), torch.randn(4, 5, 6)
    call = PerExampleRerun(matrix, "matrix", ((x,), {}), matrix(x))
    formed, lazy = (
        call.factors(call.tensors(((x,), {})), [d], {"matrix": matrix.matrix}, [MAJOR], 4, budget)[
            "matrix"
        ]
        for budget in (4 * 36 * 4, 4 * 36 * 4 - 1)
    )
    assert isinstance(formed, Dense) and not isinstance(lazy, Dense)
    expected = torch.einsum("bti,btj->bij", x, d)
    torch.testing.assert_close(formed.dense(), expected)
    torch.testing.assert_close(lazy.dense(), expected)
    torch.testing.assert_close(lazy[1:3].dense(), expected[1:3])
    assert lazy[1:3].batch == 2


def test_inputs_of_layers_are_freed_after_the_last_readout():
    network, inputs = network_and_inputs()
    seen = []
    network.blocks[1].norm.register_forward_hook(lambda m, a, y: seen.append(weakref.ref(a[0])))

    def run(capture):
        seen.clear()
        values = square(network, inputs)
        assert seen[0]() is not None
        capture.backward(values)
        del values
        assert seen[0]() is None

    settled(network, Keep(choose_parameters(network)), run)


# Refusals: each names what it refuses and says what to do.


def test_an_input_changed_in_place_is_refused():
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            y = self.a(x)
            return self.b(y) + y.mul_(2)

    with pytest.raises(DminError, match=r"input of layer b was changed in place"):
        captured(Changing(), {"x": torch.randn(4, 6)})


def test_dropout_around_a_parameter_is_refused():
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.dropout = nn.Parameter(torch.randn(6)), nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(x * self.scale)

    network, inputs = nn.Sequential(Dropped()), {"input": torch.randn(4, 5, 6)}
    with pytest.raises(
        DminError, match=r"^0 \(Dropped\) fails or returns a different output.*eval mode"
    ):
        captured(network, inputs)
    check(network.eval(), inputs)


def test_a_module_run_without_gradients_is_refused():
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            with torch.no_grad():
                x = self.a(x)
            return self.b(x)

    with pytest.raises(
        DminError, match=r"^a ran without gradients, so the gradients of a\.bias, a\.weight"
    ):
        captured(Cut(), {"x": torch.randn(4, 6)})


def test_a_parameter_used_outside_the_network_is_refused():
    network, inputs = network_and_inputs()

    def loss(network, inputs):
        return square(network, inputs) + network.scale**2

    with pytest.raises(DminError, match=r"scale \(used outside the network's forward\)"):
        captured(network, inputs, loss)


def test_reading_parameters_without_their_gradient_is_no_use_of_them():
    network, inputs = network_and_inputs()

    def loss(network, inputs):
        assert network.state_dict() and network.scale.data.isfinite() and network.scale.shape == ()
        return square(network, inputs) + network.scale.detach() ** 2

    check(network, inputs, loss)


def test_an_output_without_rows_for_examples_is_refused():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6))

        def forward(self, x):
            return (x * self.scale).mean((0, 1))

    def loss(network, inputs):
        return (inputs["x"] + network(**inputs)).flatten(1).mean(1)

    with pytest.raises(DminError, match=r"scale \(the network has no row for each example\)"):
        captured(Table(), {"x": torch.randn(4, 5, 6)}, loss)


def test_a_layer_whose_rows_fit_no_batch_is_refused():
    """Where the network itself is not called, nothing tells the batch before the loss does."""
    network = nn.ModuleDict({"layer": nn.Linear(6, 6)})

    def loss(network, inputs):
        return network["layer"](inputs["x"]).mean().expand(4).clone()

    with pytest.raises(DminError, match=r"layer\.bias \(layer has no row for each.*microbatch=1"):
        captured(network, {"x": torch.randn(7, 6)}, loss)


@pytest.mark.parametrize(
    "loss",
    [
        lambda n, i: square(n, i).mean(),
        lambda n, i: square(n, i).detach(),
        lambda n, i: square(n, i)[:, None],
    ],
    ids=["summed", "detached", "column"],
)
def test_a_loss_must_be_one_value_an_example(loss):
    with pytest.raises(DminError, match="one value for each example"):
        captured(*network_and_inputs(), loss)


@pytest.mark.parametrize(
    ("params", "match"),
    [("(", "is not a regular expression"), ("lora", "matches no parameter of Blocks.*time.weight")],
)
def test_what_to_attribute_must_exist(params, match):
    with pytest.raises(DminError, match=match):
        choose_parameters(network_and_inputs()[0], params)


def test_parameters_without_gradients_are_refused_by_name():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(DminError, match=r"1 parameter\(s\): 1\.weight \(torch\.uint8\)"):
        choose_parameters(network)
    assert len(choose_parameters(network, "bias|0").entries) == 3


def test_tied_weights_are_listed_once():
    parameters = choose_parameters(Tied())
    assert [entry.name for entry in parameters.entries] == ["a.weight", "b.bias"]
    assert parameters.count == 42


def test_lora_means_the_adapters_alone_whatever_their_name():
    network = nn.ModuleDict({"lora_A": nn.ModuleDict({"any": nn.Linear(2, 2)})})
    network["base"] = nn.Linear(2, 2)
    outer = nn.ModuleDict({"q": network})
    assert {e.name for e in choose_parameters(outer, "lora").entries} == {
        "q.lora_A.any.weight",
        "q.lora_A.any.bias",
    }
    with pytest.raises(DminError, match=r"params='lora' matches no parameter.*model\.adapter"):
        choose_parameters(nn.Linear(2, 2), "lora")


class Mapped(nn.Module):
    """Calls a layer inside ``torch.vmap``, where its rows have no examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.vmap(self.layer)(x)


def test_a_layer_inside_vmap_is_refused_by_name():
    with pytest.raises(DminError, match=r"layer layer runs inside torch\.vmap.*params=<regex>"):
        captured(Mapped(), {"x": torch.randn(3, 5, 4)})
