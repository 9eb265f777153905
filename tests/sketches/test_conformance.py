"""What every sketch must be: linear, unbiased, within its stated variance, keyed, and one map.

The suite runs over every YAML of conf/sketch, and every concrete sketch must have one.
"""

import inspect

import pytest
import torch
from hydra.utils import instantiate
from made_sketches import (
    ALL,
    CONF,
    KINDS,
    SEEDED,
    SHAPES,
    K,
    build,
    every_random_sketch,
    every_sketch,
    flat,
    gradients,
    matrix,
    parameters_of,
    residues,
)
from omegaconf import OmegaConf
from oracle import settled
from torch import nn

from dmin import sketches
from dmin.gradients.factors import Dense, Outer, Sum
from dmin.gradients.layers import layer_gradient
from dmin.gradients.parameters import Parameter, Parameters, choose_parameters
from dmin.runtime.errors import DminError
from dmin.sketches import Auto, BlockCyclic, Sketch, TensorSketch
from dmin.sketches.mask_sjlt import kept_places


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
    limits = {"max_dim", "max_bytes"}  # say when to refuse, not what the map is
    expected = {"family": sketch.family} | {key: config[key] for key in arguments - limits}
    expected |= {} if sketch.folds is None else {"folds": sketch.folds}
    assert described == expected | ({} if sketch.revision == 1 else {"revision": sketch.revision})


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
    assert sketch.of(g).shape == (3, 1, sketch.dim)


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

    def run(capture):
        return capture.backward(network(x).square().mean((1, 2)))

    found = settled(network, sketch, run, budget)
    torch.testing.assert_close(found.values, sketch.of(truth))
    norms = flat(truth, sketch.parameters).square().sum(1, keepdim=True)
    if sketch.norm_kind == "exact":
        torch.testing.assert_close(found.squared_norm, norms)


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


@every_random_sketch
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
    assert rows.shape == (3, 2, sketch.dim)
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


@every_random_sketch
def test_a_sketch_larger_than_the_gradient_is_refused(name):
    with pytest.raises(DminError, match=r"sketch\.dim=32 is larger than the 31"):
        build(name).bind(parameters_of(bias=(31,)))
    build(name).bind(parameters_of(bias=(32,)))


@every_random_sketch
def test_a_sketch_of_no_numbers_is_refused(name):
    with pytest.raises(DminError, match=r"sketch\.dim"):
        build(name, dim=0)


@every_sketch
def test_binding_leaves_the_sketch_itself_unbound(name):
    sketch = build(name)
    sketch.bind(ALL)
    with pytest.raises(RuntimeError, match="bind"):
        sketch.of(gradients(1))


LAYERS = {
    "tokens": (nn.Linear(24, 20), (3, 7, 24), (3, 7, 20)),
    "one row": (nn.Linear(24, 20), (3, 24), (3, 20)),
    "wide": (nn.Linear(70, 40), (3, 11, 70), (3, 11, 40)),
    "conv": (nn.Conv2d(6, 10, 3, stride=2, padding=1), (3, 6, 9, 8), (3, 10, 5, 4)),
    "circular": (
        nn.Conv2d(6, 10, 3, padding=1, padding_mode="circular"),
        (3, 6, 5, 5),
        (3, 10, 5, 5),
    ),
    "same": (nn.Conv2d(6, 10, 4, padding="same"), (3, 6, 5, 5), (3, 10, 5, 5)),
    "dilated": (nn.Conv1d(6, 10, 3, dilation=2), (3, 6, 12), (3, 10, 8)),
    "volume": (nn.Conv3d(2, 9, 2), (3, 2, 3, 4, 3), (3, 9, 2, 3, 2)),
    "grouped": (nn.Conv2d(6, 10, 3, groups=2), (3, 6, 5, 5), (3, 10, 3, 3)),
    "depthwise": (nn.Conv2d(12, 12, 3, groups=12), (3, 12, 5, 5), (3, 12, 3, 3)),
    "transposed": (nn.ConvTranspose2d(6, 10, 3, stride=2), (3, 6, 4, 4), (3, 10, 9, 9)),
    "looked up": (nn.Embedding(50, 12), (3, 6), (3, 6, 12)),
    "norm": (nn.GroupNorm(2, 40), (3, 40, 4), (3, 40, 4)),
}


def factors_of(layer, dtype=torch.float64):
    """Weight factors of two calls of a layer, as backward hands them on."""
    generator = torch.Generator().manual_seed(0)
    module, a, d = LAYERS[layer]
    module = module.to(dtype)
    found = []
    for _ in range(2):
        inputs = torch.randn(a, generator=generator, dtype=torch.float64).to(dtype)
        if isinstance(module, nn.Embedding):
            inputs = torch.randint(50, a, generator=generator)
        output = torch.randn(d, generator=generator, dtype=torch.float64).to(dtype)
        found.append(layer_gradient(module)(module, inputs, output, 3)["weight"])
    return found


def sketched(sketch, factors, budget, wide=torch.float64):
    state = sketch.begin(3, torch.zeros((), dtype=wide), budget)
    sketch.add(state, "w", factors)
    return sketch.finish(state).values


@every_sketch
@pytest.mark.parametrize("layer", LAYERS)
def test_from_factors_it_is_the_sketch_of_the_formed_gradient(name, layer):
    once, again = factors_of(layer)
    formed = once.dense()
    sketch = build(name).bind(parameters_of(w=formed.shape[1:], other=(100,)))
    for budget in (1, 1 << 24):
        torch.testing.assert_close(sketched(sketch, once, budget), sketch.of({"w": formed}))
    both = Sum([once, again])
    torch.testing.assert_close(sketched(sketch, both, 4000), sketch.of({"w": both.dense()}))


@every_sketch
@pytest.mark.parametrize("layer", LAYERS)
def test_half_precision_costs_its_rounding_and_no_more(name, layer):
    """Sums are in float32: rows are those of the rounded factors; these are off by 2⁻⁸ a side."""
    half, full = factors_of(layer, torch.bfloat16)[0], factors_of(layer)[0]
    sketch = build(name).bind(parameters_of(w=full.dense().shape[1:], other=(100,)))
    found = sketched(sketch, half, 1 << 20, torch.float32)
    expected = sketch.of({"w": half.dense().double()})
    assert float((found - expected).norm() / expected.norm()) < 2e-6
    exact = sketch.of({"w": full.dense()})
    assert float((found - exact).norm() / exact.norm()) < 2 * 2**-8


def folding(name):
    return build(name).folds is not None


@pytest.mark.parametrize(("large", "small"), [(64, 32), (96, 32), (64, 8), (64, 64)])
@pytest.mark.parametrize("name", [name for name in SEEDED if folding(name)])
def test_what_folds_does_so_by_residue(name, large, small):
    settings = {"block": 8, "keep": 600}
    rows = build(name, large, **settings).bind(ALL).of(gradients(3))
    folded = build(name, small, **settings).bind(ALL).of(gradients(3))
    torch.testing.assert_close(residues(rows, small), folded)


@pytest.mark.parametrize("wide", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [name for name in SEEDED if folding(name)])
def test_folded_rows_are_those_collected_at_the_smaller_k(name, wide, monkeypatch):
    """From the factors of a real backward pass, however the map is evaluated at either k."""
    torch.manual_seed(0)
    network, x = Network().to(wide), torch.randint(7, (4, 5))
    parameters = choose_parameters(network)
    if name == "auto":  # its matrices are large ones here, its other parameters are not
        assert build(name, from_size=36).bind(parameters).norm_kind == "sketch"

    def collected(dim):
        transforms = name == "auto" and dim == 64  # one from spectra, the other formed
        monkeypatch.setattr(TensorSketch, "_transforms_are_cheaper", lambda *_: transforms)
        settings = {"from_size": 36} if name == "auto" else {}
        sketch = build(name, dim, **settings).bind(parameters)

        def run(capture):
            return capture.backward(network(x).square().mean((1, 2))).values

        return settled(network, sketch, run)

    large = collected(64)
    for small in (32, 16, 8):
        error = (residues(large, small) - collected(small)).norm()
        assert error <= (1e-12 if wide == torch.float64 else 2e-6) * large.norm()


@pytest.mark.parametrize("name", [name for name in SEEDED if not folding(name)])
def test_what_does_not_declare_that_it_folds_does_not(name):
    rows = build(name, 64).bind(ALL).of(gradients(3))
    assert not torch.allclose(residues(rows, 32), build(name, 32).bind(ALL).of(gradients(3)))
    assert "folds" not in build(name).describe()


@every_random_sketch
@pytest.mark.parametrize("dim", [2**8, 2**20])
def test_dims_from_small_to_large(name, dim):
    """k = 2^8 … 2^20 needs no other setting, but where keeping a matrix is a family's nature."""
    config = OmegaConf.to_container(OmegaConf.load(CONF[name]))
    config |= {"dim": dim} | ({"keep": 8 * dim} if "keep" in config else {})
    kind = KINDS[name]
    sketch = kind(**{key: value for key, value in config.items() if key != "_target_"})
    parameters = parameters_of(w=(2048, 1024), b=(2048,))
    if name == "gaussian" and dim > 2**10:
        with pytest.raises(DminError, match=r"2,099,200 numbers, 8,804,682,956,800 bytes"):
            sketch.bind(parameters)
        return
    rows = sketch.bind(parameters).of({"b": torch.ones(1, 2048)})
    assert rows.shape == (1, 1, dim) and bool(rows.any())


@pytest.mark.gpu
@every_sketch
def test_the_map_is_the_same_on_a_gpu(name):
    sketch, g = build(name).bind(ALL), gradients(3)
    found = sketch.of({key: x.cuda() for key, x in g.items()})
    torch.testing.assert_close(found.cpu(), sketch.of(g))


# Families' own.


def test_the_full_gradient_is_itself_and_refused_where_it_is_large():
    sketch, g = build("none").bind(ALL), gradients(3)
    assert torch.equal(sketch.of(g)[:, 0], flat(g))
    with pytest.raises(DminError, match=r"full gradient, here 4,096 .*16,384 bytes"):
        build("none", max_dim=4000).bind(parameters_of(w=(64, 64)))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sjlt", {"nonzeros": 5}, r"sketch\.nonzeros=5 with sketch\.dim=32"),
        ("mask_sjlt", {"keep": 31}, r"sketch\.keep=31 with sketch\.dim=32"),
        ("gaussian", {"max_bytes": 1000}, r"32 × 31.*sketch\.max_bytes=1,000"),
    ],
)
def test_settings_that_cannot_be(name, settings, message):
    with pytest.raises(DminError, match=message):
        build(name, **settings).bind(parameters_of(bias=(317,)))


def test_a_mask_keeps_as_many_as_asked_and_any_prefix_of_a_parameter_alike():
    short, long = (kept_places(7, size, 0.01) for size in (50_000, 100_000))
    assert abs(len(long) - 1000) < 6 * 1000**0.5
    assert torch.equal(long[long < 50_000], short)
    assert torch.equal(kept_places(7, 5, 1.0), torch.arange(5))
    hits = torch.stack([torch.bincount(kept_places(k, 40, 0.3), minlength=40) for k in range(800)])
    assert hits.max() == 1 and (hits.double().mean(0) - 0.3).abs().max() < 5 * (0.21 / 800) ** 0.5


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


# Auto.


def test_auto_is_tensor_sketch_for_large_matrices_and_block_cyclic_for_all_else():
    shapes = {"large": (40, 32), "small": (20, 30), "kernel": (40, 8, 2, 2), "vector": (1300,)}
    parameters = parameters_of(**shapes, wide=(40, 9, 2, 2))
    g = gradients(2, parameters)
    auto = build("auto", from_size=1280, from_kernel=1440).bind(parameters)
    for name in g:
        whose = "tensor_sketch" if name in ("large", "wide") else "block_cyclic"
        expected = build(whose).bind(parameters).of({name: g[name]})
        torch.testing.assert_close(auto.of({name: g[name]}), expected)


def test_auto_measures_norms_where_everything_is_formed():
    formed = parameters_of(w=(40, 30), v=(1000,))
    assert build("auto", from_size=1201).bind(formed).norm_kind == "exact"
    assert build("auto", from_size=1200).bind(formed).norm_kind == "sketch"


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
    sketch = Auto(4096)
    assert sketch._transforms_are_cheaper((9216, 1536), 1)
    assert sketch._transforms_are_cheaper((1536, 6144), 333)
    assert sketch._transforms_are_cheaper((1280, 1280, 3, 3), 64)
    assert not sketch._transforms_are_cheaper((320, 320), 256)
    assert sketch.tensor_sketched(Parameter("w", (512, 512)))
    assert not sketch.tensor_sketched(Parameter("w", (512, 511)))
    assert not sketch.tensor_sketched(Parameter("w", (640, 640, 3, 3)))
    assert sketch.tensor_sketched(Parameter("w", (1280, 1280, 3, 3)))
    assert not sketch.tensor_sketched(Parameter("b", (1 << 30,)))


GOLDEN = {
    "tensor_sketch": ([9, 2, 7, 4, 8, 16, 1, 6], "+-+----+"),
    "block_cyclic": ([6, 21, 24, 18, 0, 28, 15, 10], "++--+-+-"),
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
