"""What every sketch must be: linear, unbiased, within its stated variance, keyed, and one map.

The suite runs over every YAML of conf/sketch, and every concrete sketch must have one.
"""

import inspect
from math import prod
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import nn

from dmin import sketches
from dmin.capture import Capture, choose_parameters
from dmin.errors import DminError
from dmin.layer_gradients import Dense, Outer, Sum
from dmin.sketches import BlockCyclic, Parameter, Parameters, Sketch, TensorSketch

CONF = {path.stem: path for path in Path(__file__).parents[2].glob("conf/sketch/*.yaml")}
K = 32


def build(name: str, dim: int = K, seed: int = 0) -> Sketch:
    """The sketch of a YAML, at a size for tests."""
    settings = OmegaConf.to_container(OmegaConf.load(CONF[name]))
    small = {"block": 8, "from_size": 1}
    settings |= {"dim": dim, "seed": seed} | {k: v for k, v in small.items() if k in settings}
    return get_class(settings.pop("_target_"))(**settings)


every_sketch = pytest.mark.parametrize("name", sorted(CONF))


def parameters_of(**shapes) -> Parameters:
    return Parameters(tuple(Parameter(name, shape) for name, shape in shapes.items()))


# A fold at fixed strides collides along whole columns where the width is k or divides it.
SHAPES = {
    "conv": (10, 3, 3, 3),
    "half": (40, K // 2),
    "same": (20, K),
    "double": (10, 2 * K),
    "row": (1, 3 * K),
    "bias": (33,),
    "scalar": (),
}
ALL = parameters_of(**SHAPES)


def gradients(batch: int, parameters: Parameters = ALL, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch, *shape, generator=generator, dtype=dtype)
        for name, shape, _ in parameters.entries
    }


def flat(gradients, parameters: Parameters = ALL):
    parts = [gradients[name].reshape(len(gradients[name]), -1) for name in parameters.by_name]
    return torch.cat(parts, 1)


def matrix(sketch: Sketch):
    """The map as a dense matrix ``[P, groups, k]``: what it makes of the identity."""
    rows = []
    for name, shape, _ in sketch.parameters.entries:
        identity = torch.eye(prod(shape), dtype=torch.float64).reshape(-1, *shape)
        rows.append(sketch.of({name: identity}))
    return torch.cat(rows)


def test_every_sketch_has_a_yaml():
    exported = [getattr(sketches, name) for name in sketches.__all__]
    concrete = {
        f"dmin.sketches.{kind.__name__}"
        for kind in exported
        if isinstance(kind, type) and issubclass(kind, Sketch) and not inspect.isabstract(kind)
    }
    assert {OmegaConf.load(path)._target_ for path in CONF.values()} == concrete


@every_sketch
def test_the_yaml_is_complete_and_describes_the_map(name):
    config = OmegaConf.load(CONF[name])
    sketch = instantiate(config)
    arguments = set(inspect.signature(type(sketch)).parameters)
    assert set(config) == arguments | {"_target_"}
    described = sketch.describe()
    folds = {} if sketch.folds is None else {"folds": sketch.folds}
    assert described == {"family": sketch.family} | {key: config[key] for key in arguments} | folds


@every_sketch
def test_linear(name):
    sketch = build(name).bind(ALL)
    g, h = gradients(3), gradients(3, seed=1)
    combined = sketch.of({key: 2 * g[key] - 3 * h[key] for key in g})
    torch.testing.assert_close(combined, 2 * sketch.of(g) - 3 * sketch.of(h))


@every_sketch
def test_equal_to_its_dense_matrix(name):
    sketch = build(name).bind(ALL)
    g = gradients(3)
    expected = torch.einsum("bp,pgk->bgk", flat(g), matrix(sketch))
    torch.testing.assert_close(sketch.of(g), expected)
    assert sketch.of(g).shape == (3, 1, K)


class Network(nn.Module):
    """Some of everything: tied, convolved, looked up, a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv = nn.Embedding(7, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight, self.scale = self.a.weight, nn.Parameter(torch.randn(6))

    def forward(self, x):
        y = self.conv(self.words(x).transpose(1, 2)).transpose(1, 2)
        return self.b(torch.tanh(self.a(self.norm(y)))) * self.scale


@every_sketch
@pytest.mark.parametrize("budget", [1, None])
def test_captured_rows_are_the_sketch_of_autograds_gradients(name, budget):
    torch.manual_seed(0)
    network, x = Network().double(), torch.randint(7, (4, 5))
    named = dict(network.named_parameters())
    rows = [
        torch.autograd.grad(network(x[b : b + 1]).square().mean(), list(named.values()))
        for b in range(4)
    ]
    truth = {key: torch.stack(g) for key, *g in zip(named, *rows, strict=True)}
    sketch = build(name).bind(choose_parameters(network))
    assert "b.weight" not in sketch.parameters.by_name  # it is a.weight
    with Capture(network, sketch, budget) as capture:
        found = capture.backward(network(x).square().mean((1, 2)))
    torch.testing.assert_close(found.values, sketch.of(truth))
    norms = flat(truth, sketch.parameters).square().sum(1, keepdim=True)
    if sketch.norm_kind == "exact":
        torch.testing.assert_close(found.squared_norm, norms)


def outlier(g, factor: float = 30.0):
    """One input channel far larger than the others, as in trained networks."""
    return {key: torch.cat([factor * x[..., :1], x[..., 1:]], -1) for key, x in g.items()}


def pair(case: str):
    """Two gradients of one parameter each, related (ρ ≈ 0.7) or one and the same."""
    shape, _, kind = case.partition(" ")
    parameters = parameters_of(**{shape: SHAPES[shape]})
    g, noise = gradients(1, parameters), gradients(1, parameters, seed=1)
    if kind == "alike":
        h = g
    elif kind == "even":
        g = h = {key: torch.ones_like(x) for key, x in g.items()}
    else:
        h = {key: g[key] + noise[key] for key in g}
    if kind == "outlier":
        g, h = outlier(g), outlier(h)
    return parameters, {key: torch.cat([g[key], h[key]]) for key in g}


SEEDS = 300
CASES = [
    *("conv", "half", "same", "double", "row", "bias"),
    *("half alike", "same alike", "double alike", "row alike"),
    *("half outlier", "same outlier", "double outlier"),
    *("half even", "same even", "double even"),
]


def stated_variance(sketch, parameters, both):
    """The bound in the docstring of the sketch, for two gradients of one parameter."""
    g, h = flat(both, parameters)
    oporp = float((g @ g) * (h @ h) + (g @ h) ** 2) / K
    entry = parameters.entries[0]
    if not isinstance(sketch, TensorSketch) or not sketch.tensor_sketched(entry):
        return oporp
    g, h = g.view(entry.shape), h.view(entry.shape)
    across, along = g.T @ h, g @ h.T
    return oporp + float(sum(m.square().sum() + (m @ m).trace() for m in (across, along))) / K


@every_sketch
@pytest.mark.parametrize("case", CASES)
def test_inner_products_are_unbiased_and_vary_no_more_than_stated(name, case):
    """k·Var⟨Sg, Sh⟩ is within the stated bound, for every shape of layer alike."""
    parameters, both = pair(case)
    g, h = flat(both, parameters)
    estimates = torch.stack(
        [
            (rows := build(name, seed=seed).bind(parameters).of(both)[:, 0])[0] @ rows[1]
            for seed in range(SEEDS)
        ]
    )
    bound = stated_variance(build(name), parameters, both)
    assert abs(float(estimates.mean() - g @ h)) <= 4.5 * (bound / SEEDS) ** 0.5
    assert float(estimates.var()) <= bound * (1 + 6 * (2 / SEEDS) ** 0.5)


@every_sketch
def test_nothing_is_normalised(name):
    sketch = build(name).bind(ALL)
    state = sketch.begin(2, torch.zeros((), dtype=torch.float64))
    g = gradients(2)
    for key in g:
        sketch.add(state, key, Dense(5 * g[key]))
    rows = sketch.finish(state)
    torch.testing.assert_close(rows.values, 5 * sketch.of(g))
    if sketch.norm_kind == "exact":
        norms = 25 * flat(g).square().sum(1, keepdim=True)
        torch.testing.assert_close(rows.squared_norm, norms)


@every_sketch
def test_the_map_is_that_of_seed_and_names(name):
    parameters = parameters_of(a=(5, 40), b=(5, 40))
    g = gradients(2, parameters)
    first = build(name).bind(parameters).of(g)
    assert torch.equal(first, build(name).bind(parameters).of(g))
    assert not torch.allclose(first, build(name, seed=1).bind(parameters).of(g))
    dense = matrix(build(name).bind(parameters))[:, 0]
    overlap = (dense[:200] * dense[200:]).sum()  # how alike the maps of a and b are
    assert abs(float(overlap)) < 6 * (200 / K) ** 0.5


@every_sketch
def test_the_map_knows_no_precision(name):
    sketch = build(name).bind(ALL)
    g = gradients(2)
    single = sketch.of({key: x.float() for key, x in g.items()})
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), sketch.of(g), rtol=1e-4, atol=1e-4)


@every_sketch
def test_rows_do_not_depend_on_order_batch_or_budget(name):
    sketch, g = build(name).bind(ALL), gradients(5)
    expected = sketch.of(g)
    reversed_order = sketch.of(dict(reversed(g.items())))
    torch.testing.assert_close(reversed_order, expected)
    parts = [sketch.of({key: x[part] for key, x in g.items()}) for part in (slice(2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), expected)
    for budget in (1, 5000, 1 << 30):
        state = sketch.begin(5, torch.zeros((), dtype=torch.float64), budget)
        for key in g:
            sketch.add(state, key, Dense(g[key]))
        torch.testing.assert_close(sketch.finish(state).values, expected)


@every_sketch
def test_values_may_be_wider_than_gradients_and_the_other_way_round(name):
    sketch, g = build(name).bind(ALL), gradients(2)
    for wide, narrow in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        state = sketch.begin(2, torch.zeros((), dtype=wide))
        for key in g:
            sketch.add(state, key, Dense(g[key].to(narrow)))
        assert sketch.finish(state).values.dtype == wide


@every_sketch
def test_groups_are_kept_apart(name):
    entries = [Parameter("a", (5, 40), 1), Parameter("b", (7, 9), 0), Parameter("c", (30,), 1)]
    sketch = build(name).bind(Parameters(tuple(entries), ("down", "up")))
    g = gradients(3, sketch.parameters)
    rows = sketch.of(g)
    assert rows.shape == (3, 2, K)
    for group, members in enumerate(("b", "ac")):
        alone = sketch.of({key: x for key, x in g.items() if key in members})
        torch.testing.assert_close(alone[:, group], rows[:, group])
        assert not alone[:, 1 - group].any()
    state = sketch.begin(3, torch.zeros((), dtype=torch.float64))
    for key in g:
        sketch.add(state, key, Dense(g[key]))
    if sketch.norm_kind == "exact":
        norms = [sum(g[key].flatten(1).square().sum(1) for key in keys) for keys in ("b", "ac")]
        torch.testing.assert_close(sketch.finish(state).squared_norm, torch.stack(norms, 1))


@every_sketch
def test_a_sketch_larger_than_the_gradient_is_refused(name):
    with pytest.raises(DminError, match=r"sketch\.dim=32 is larger than the 31"):
        build(name).bind(parameters_of(bias=(31,)))
    build(name).bind(parameters_of(bias=(32,)))


@every_sketch
def test_a_sketch_of_no_numbers_is_refused(name):
    with pytest.raises(DminError, match=r"sketch\.(dim|block)"):
        build(name, dim=0)


@every_sketch
def test_binding_leaves_the_sketch_itself_unbound(name):
    sketch = build(name)
    sketch.bind(ALL)
    assert sketch.parameters is None
    with pytest.raises(RuntimeError, match="bind"):
        sketch.of(gradients(1))


# Block-cyclic.


def test_a_block_must_fit_into_the_sketch():
    with pytest.raises(DminError, match=r"sketch\.block=9 with sketch\.dim=8"):
        BlockCyclic(dim=8, block=9)
    BlockCyclic(dim=8, block=8)


@pytest.mark.parametrize(("large", "small"), [(64, 32), (96, 32), (64, 8), (64, 64)])
def test_block_cyclic_folds_by_residue(large, small):
    sketch, folded = BlockCyclic(large, block=8).bind(ALL), BlockCyclic(small, block=8).bind(ALL)
    for name in SHAPES:
        bucket, sign = sketch.fold(name, torch.device("cpu"))
        expected, expected_sign = folded.fold(name, torch.device("cpu"))
        assert torch.equal(bucket % small, expected)
        assert torch.equal(sign, expected_sign)
    rows = sketch.of(gradients(3))
    torch.testing.assert_close(rows.unflatten(-1, (-1, small)).sum(-2), folded.of(gradients(3)))


def test_entries_of_a_block_never_collide_and_others_do_so_once_in_k():
    sketch = BlockCyclic(K, block=8)
    parameters = parameters_of(w=(16 * 8,))
    hits = torch.zeros(16 * 8)
    for seed in range(400):
        sketch.seed = seed
        bucket, _ = sketch.bind(parameters).fold("w", torch.device("cpu"))
        hits += bucket == bucket[0]
    assert hits[0] == 400
    assert not hits[1:8].any()
    assert abs(float(hits[8:].mean()) / 400 - 1 / K) < 5 * (1 / K / 400 / 15) ** 0.5


# TensorSketch.


@pytest.mark.parametrize("budget", [1, 1 << 20])
@pytest.mark.parametrize(("batch", "positions"), [(3, 1), (2, 7), (1, 40)])
def test_tensor_sketch_from_factors_is_that_of_the_formed_gradient(
    batch, positions, budget, monkeypatch
):
    shape = (30, 45)
    sketch = build("tensor_sketch").bind(parameters_of(w=shape, b=(40,)))
    generator = torch.Generator().manual_seed(0)

    def factors():
        d = torch.randn(batch, positions, shape[0], generator=generator, dtype=torch.float64)
        a = torch.randn(batch, positions, shape[1], generator=generator, dtype=torch.float64)
        return Outer(d, a)

    first, second = factors(), factors()
    expected = sketch.of({"w": first.dense() + second.dense()})
    formed = []
    monkeypatch.setattr(Outer, "dense", lambda self: formed.append(self))
    monkeypatch.setattr(TensorSketch, "_transforms_are_cheaper", lambda *_: True)
    state = sketch.begin(batch, torch.zeros((), dtype=torch.float64), budget)
    sketch.add(state, "w", Sum([first, second]))
    torch.testing.assert_close(sketch.finish(state).values, expected)
    assert not formed


def test_tensor_sketch_follows_the_cost_and_its_map_the_shape_alone():
    sketch = TensorSketch(4096)
    assert sketch._transforms_are_cheaper(1536 * 9216, 1)
    assert sketch._transforms_are_cheaper(3072 * 768, 333)
    assert not sketch._transforms_are_cheaper(320 * 320, 256)
    assert sketch.tensor_sketched(Parameter("w", (512, 512)))
    assert not sketch.tensor_sketched(Parameter("w", (512, 511)))
    assert not sketch.tensor_sketched(Parameter("w", (512, 512, 3, 3)))


@pytest.mark.parametrize(("large", "small"), [(64, 32), (96, 32)])
def test_tensor_sketch_folds_by_residue(large, small):
    rows = build("tensor_sketch", large).bind(ALL).of(gradients(3))
    folded = build("tensor_sketch", small).bind(ALL).of(gradients(3))
    torch.testing.assert_close(rows.unflatten(-1, (-1, small)).sum(-2), folded)


GOLDEN = {
    "tensor_sketch": ([31, 0, 1, 2, 18, 19, 20, 21], "+--+++--"),  # a kernel is block-cyclic
    "block_cyclic": ([31, 0, 1, 2, 18, 19, 20, 21], "+--+++--"),
    "oporp": ([9, 22, 20, 22, 21, 19, 18, 15], "-++++---"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_maps(name):
    """The first entries of the map of a parameter: no change to it goes unnoticed."""
    sketch = build(name).bind(parameters_of(**{"conv_in.weight": (8, 3, 3, 3)}))
    bucket, sign = sketch.fold("conv_in.weight", torch.device("cpu"))
    buckets, signs = GOLDEN[name]
    assert bucket[4:12].tolist() == buckets
    assert "".join("+" if s > 0 else "-" for s in sign[4:12]) == signs
