"""⟨Sg, Sh⟩ is ⟨g, h⟩ in the mean, and varies no more than the docstring of each family says.

Three hundred maps are three hundred parameters of other names, each in a group of its own.
"""

import pytest
import torch
from made_sketches import SHAPES, K, build, every_random_sketch, every_sketch, flat, parameters_of

from dmin.gradients.parameters import Parameter, Parameters
from dmin.sketches import Sketch
from dmin.sketches.bounds import matrix_shape, moments

MAPS = 300
LAYERS = {**SHAPES, "embedding": (50, 24)}
CASES = [
    *("conv", "depthwise", "half", "same", "double", "row", "bias", "embedding lookup"),
    *("half alike", "same alike", "double alike", "row alike"),
    *("half outlier", "same outlier", "double outlier"),
    *("half even", "same even", "double even"),
    *("same one-row", "double one-row", "half tokens", "same tokens", "conv tokens"),
    *("same one-row-alike", "double tokens-alike"),
]


def pair(case: str):
    """Two gradients ``[2, *shape]`` of one parameter, related (ρ ≈ 0.7), or one and the same."""
    layer, _, kind = case.partition(" ")
    shape, generator = LAYERS[layer], torch.Generator().manual_seed(len(case))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    g, noise = draw(*shape), draw(*shape)
    h = g + noise
    out, inside = matrix_shape(shape)
    if kind.startswith(("one-row", "tokens")):  # as a Linear layer's: few outer products
        rank = 1 if kind.startswith("one-row") else 4
        d, a = draw(2, out, rank), draw(2, rank, inside)
        d[1], a[1] = d[0] + 0.7 * d[1], a[0] + 0.7 * a[1]
        g, h = (d @ a).reshape(2, *shape)
    if kind.endswith("alike"):
        h = g
    elif kind == "even":
        g = h = torch.ones(shape, dtype=torch.float64)
    elif kind == "lookup":  # the same few words looked up
        seen = torch.zeros(out, 1, dtype=torch.float64)
        seen[:5] = 1
        g, h = g * seen, h * seen
    elif kind == "outlier":  # one input channel far larger, as in trained networks
        channel = torch.ones(inside, dtype=torch.float64)
        channel[0] = 30
        g, h = g * channel, h * channel
    return torch.stack([g, h])


def stated_bound(sketch, parameters: Parameters, both: dict) -> float:
    """The bound of a family for two gradients ``{name: [2, *shape]}`` of all parameters."""
    pairs = {p.name: (both[p.name][:1], both[p.name][1:]) for p in parameters.entries}
    g, h = flat(both, parameters)
    whole = 0.0 if sketch.family == "none" else float((g @ g) * (h @ h) + (g @ h) ** 2) / K
    for name, (one, other) in pairs.items():
        beyond = sketch.variance(name, one, other) - Sketch.variance(sketch, name, one, other)
        whole += float(beyond) * (sketch.family != "none")
    return whole


def check(sketch, parameters: Parameters, both: dict, groups: int):
    """Hold mean and variance over groups, each a map of its own, to the statement."""
    first = Parameters(tuple(p for p in parameters.entries if p.group == 0), ("0",))
    rows = sketch.of(both)
    estimates = (rows[0] * rows[1]).sum(-1)
    one = {p.name: both[p.name] for p in first.entries}
    g, h = flat(one, first)
    bound = stated_bound(sketch, first, one)
    rounding = 1e-12 * float(g.norm() * h.norm())
    assert abs(float(estimates.mean() - g @ h)) <= 4.5 * (bound / groups) ** 0.5 + rounding
    assert float(estimates.var()) <= bound * (1 + 6 * (2 / groups) ** 0.5) + rounding**2
    return float(estimates.var()), bound


@every_sketch
@pytest.mark.parametrize("case", CASES)
def test_of_one_layer(name, case):
    both = pair(case)
    names = [f"w{i}" for i in range(MAPS)]
    entries = tuple(Parameter(w, tuple(both.shape[1:]), i) for i, w in enumerate(names))
    parameters = Parameters(entries, tuple(names))
    sketch = build(name, keep=parameters.count // 2).bind(parameters)
    check(sketch, parameters, dict.fromkeys(names, both), MAPS)


@every_sketch
def test_of_a_whole_model(name):
    """All layers of a model added up in one row: what they do to each other is bounded as well."""
    maps = 100
    cases = ["conv", "same tokens", "double one-row", "half outlier", "bias", "embedding lookup"]
    names = [(f"{case} {i}", case, i) for i in range(maps) for case in cases]
    found = {case: pair(case) for case in cases}
    found = {case: x / x[0].norm() for case, x in found.items()}
    both = {name: found[case] for name, case, _ in names}
    entries = [Parameter(name, tuple(both[name].shape[1:]), i) for name, _, i in names]
    parameters = Parameters(tuple(entries), tuple(map(str, range(maps))))
    sketch = build(name, keep=parameters.count // 2).bind(parameters)
    check(sketch, parameters, both, maps)


@pytest.mark.parametrize("shape", [(64, 64), (8, 512), (512, 3), (33,)])
def test_factored_states_its_shares(shape):
    """k₁k₂ = k, and a side no longer than its share is kept whole: no error of its own."""
    parameters = parameters_of(w=shape)
    sketch = build("factored", dim=32).bind(parameters)
    shares, sizes = sketch.shares(parameters.entries[0]), matrix_shape(shape)
    assert shares[0] * shares[1] == 32
    sides = sketch.sides(parameters.entries[0], torch.zeros((), dtype=torch.float64))
    for side, share, size in zip(sides, shares, sizes, strict=True):
        identity = side.matrix.T @ side.matrix
        assert side.to == share
        torch.testing.assert_close(identity.diagonal(), torch.ones(size).double())
        if size <= share:
            torch.testing.assert_close(identity, torch.eye(size).double())


TIGHT = ["same", "same one-row", "double tokens-alike", "bias"]


@pytest.mark.parametrize("case", TIGHT)
@every_random_sketch
def test_bounds_say_something(name, case):
    """No bound is so wide that it would hold for anything."""
    both = pair(case)
    names = [f"w{i}" for i in range(MAPS)]
    entries = tuple(Parameter(w, tuple(both.shape[1:]), i) for i, w in enumerate(names))
    parameters = Parameters(entries, tuple(names))
    sketch = build(name, keep=parameters.count // 2).bind(parameters)
    found, bound = check(sketch, parameters, dict.fromkeys(names, both), MAPS)
    assert found > bound / 4


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 3, 2), (7,), ()])
def test_moments_are_those_of_their_definition(shape):
    g, h = torch.randn(2, 3, *shape, dtype=torch.float64)
    found = moments(g, h)
    for i in range(3):
        a, b = (x[i].reshape(matrix_shape(shape)) for x in (g, h))
        expected = (
            a.square().sum() * b.square().sum() + (a * b).sum() ** 2,
            (a.T @ b).square().sum(),
            (a @ b.T).square().sum(),
            (a.T @ b @ a.T @ b).trace(),
        )
        torch.testing.assert_close(torch.stack([x[i] for x in found]), torch.stack(expected))
