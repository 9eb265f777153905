"""Forming in registers and folding at once, on a CPU, against the formed gradient and the map."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from oracle import settled
from torch import nn

from dmin.gradients.factors import Correlation, Outer
from dmin.gradients.parameters import Parameter, Parameters, choose_parameters
from dmin.sketches import Auto, BlockCyclic, Factored, TensorSketch
from dmin.sketches.backends.cpu_threads import in_threads
from dmin.sketches.hashing import hash_words

K = 512
LAYERS = {
    "rows, one": (nn.Linear(300, 130), (1, 300)),
    "rows, some": (nn.Linear(70, 45), (33, 70)),
    "one column": (nn.Linear(1, 700), (5, 1)),
    "kernel, 16": (nn.Conv2d(40, 50, 3, padding=1), (40, 16, 16)),
    "kernel, 8": (nn.Conv2d(33, 25, 3, padding=1), (33, 8, 8)),
    "kernel, ragged": (nn.Conv2d(5, 30, 3, padding=1), (5, 13, 10)),
    "kernel, unpadded": (nn.Conv2d(7, 20, 3), (7, 12, 9)),
    "kernel, circular": (nn.Conv2d(7, 20, 3, padding=1, padding_mode="circular"), (7, 8, 12)),
    "kernel, 4": (nn.Conv2d(20, 40, 3, padding=1), (20, 4, 4)),
    "stride": (nn.Conv2d(11, 20, 3, padding=1, stride=2), (11, 9, 12)),
    "stride, rest left over": (nn.Conv2d(11, 20, (2, 3), stride=(2, 3)), (11, 9, 13)),
    "dilation": (nn.Conv2d(9, 20, (3, 5), padding=(2, 4), dilation=(2, 2)), (9, 11, 12)),
    "points": (nn.Conv2d(36, 20, 1), (36, 9, 7)),
    "patches": (nn.Conv2d(4, 90, 2, stride=2), (4, 8, 8)),
    "line": (nn.Conv1d(24, 30, 5, padding=2, stride=2), (24, 17)),
    "groups": (nn.Conv2d(12, 60, 3, padding=1, groups=3), (12, 6, 6)),
    "transposed": (nn.ConvTranspose2d(12, 20, 3, stride=2, output_padding=1), (12, 5, 6)),
    "volume": (nn.Conv3d(8, 12, 3, padding=1), (8, 3, 4, 5)),
}
MAPS = {
    "block 256": lambda: BlockCyclic(K),
    "block 32": lambda: BlockCyclic(K, block=32),
    "block 20": lambda: BlockCyclic(K, block=20),
    "tensor, formed": lambda: TensorSketch(K, from_size=1, from_kernel=1),
    "tensor, transformed": lambda: TensorSketch(K, from_size=1, from_kernel=1),
    "factored": lambda: Factored(K),
}


def rows_of(layer, x, sketch, budget=None):
    def run(capture):
        return capture.backward(layer(x).sin().flatten(1).mean(1))

    return settled(layer, sketch, run, budget)


def case(layer, batch=3):
    torch.manual_seed(0)
    module, shape = LAYERS[layer]
    return module.float(), torch.randn(batch, *shape) + 0.3


@pytest.mark.parametrize("map_of", MAPS)
@pytest.mark.parametrize("layer", LAYERS)
def test_rows_are_those_of_gradients_formed_in_double_precision(layer, map_of, monkeypatch):
    cheaper = map_of == "tensor, transformed"
    monkeypatch.setattr(TensorSketch, "_transforms_are_cheaper", lambda *_: cheaper)
    module, x = case(layer)
    sketch = MAPS[map_of]().bind(choose_parameters(module))
    found = rows_of(module, x, sketch)
    monkeypatch.setattr(TensorSketch, "_transforms_are_cheaper", lambda *_: False)
    expected = rows_of(module.double(), x.double(), sketch)
    assert found.values.dtype == torch.float32
    error = (found.values - expected.values).norm(dim=-1)
    assert (error <= 2e-6 * expected.values.norm(dim=-1)).all()
    torch.testing.assert_close(
        found.squared_norm.double(), expected.squared_norm, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("map_of", MAPS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_double_network_of_single_losses_has_the_same_rows(layer, map_of, monkeypatch):
    """The loops are single precision: wider factors are converted, never read as such."""
    cheaper = map_of == "tensor, transformed"
    monkeypatch.setattr(TensorSketch, "_transforms_are_cheaper", lambda *_: cheaper)
    module, x = case(layer)
    sketch = MAPS[map_of]().bind(choose_parameters(module))
    expected = rows_of(module, x, sketch).values
    module, x = module.double(), x.double()

    def run(capture):
        return capture.backward(module(x).sin().flatten(1).mean(1).float())

    found = settled(module, sketch, run).values
    assert found.dtype == torch.float32
    assert ((found - expected).norm(dim=-1) <= 2e-6 * expected.norm(dim=-1)).all()


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 5])
def test_rows_are_the_same_to_the_bit_for_any_number_of_threads(batch):
    generator = torch.Generator().manual_seed(0)
    d, a = (torch.randn(batch, 450, n, generator=generator) for n in (400, 350))
    image = torch.randn(batch, 40, 32, 32, generator=generator)
    kernel = Correlation(image, image.flip(0), nn.Conv2d(40, 40, 3, padding=1), (1, 1))
    entries = Parameter("w", (400, 350)), Parameter("kernel", (40, 40, 3, 3))
    sketch = BlockCyclic(K).bind(Parameters(entries))

    def rows():
        state = sketch.begin(batch, torch.zeros(()))
        sketch.add(state, "w", Outer(d, a))
        sketch.add(state, "kernel", kernel)
        return sketch.finish(state).values

    with threads(1):
        expected = rows()
    for count in (2, 3):
        with threads(count):
            assert torch.equal(rows(), expected)


def test_vectors_that_are_sketched_together_are_those_sketched_apart(monkeypatch):
    entries = [Parameter(f"v{n}", (n,), n % 2) for n in (1, 3, 40, 600, 33, 5000)]
    sketch = Auto(K).bind(Parameters(tuple(entries), ("even", "odd")))
    gradients = {p.name: torch.randn(3, *p.shape) for p in entries}
    together = sketch.of(gradients)
    monkeypatch.setattr("dmin.sketches.backends.cpu.BATCHED", 0)
    torch.testing.assert_close(sketch.of(gradients), together)
    double = sketch.of({name: g.double() for name, g in gradients.items()})
    torch.testing.assert_close(together.double(), double, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("openmp", [True, False])
def test_work_that_fails_in_a_thread_is_not_lost(openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr("dmin.sketches.backends.cpu_threads._openmp", lambda: None)

    def work(i):
        if i == 3:
            raise ValueError("three")

    done = []
    with threads(2):
        in_threads(8, done.append)
        with pytest.raises(ValueError, match="three"):
            in_threads(8, work)
    assert sorted(done) == list(range(8))


def test_the_kernels_hash_as_torch_does():
    from dmin.sketches.backends import cpu_kernels

    for key in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
        words, places = cpu_kernels.hashed_map(key, 1000, key + 1, 300, 77)
        assert words.tolist() == hash_words(key, 1000).tolist()
        assert places.tolist() == (hash_words(key + 1 & 0xFFFFFFFF, 300) % 77).tolist()


def test_tiles_of_toom_and_cook_are_correlations():
    from dmin.sketches.backends.cpu_kernels import toom_cook

    inverse, first, second = toom_cook([0, 1, -1, 2, -2], 3, 4)
    rng = np.random.default_rng(0)
    d, a = rng.standard_normal(4), rng.standard_normal(6)
    expected = [d @ a[i : i + 4] for i in range(3)]
    np.testing.assert_allclose(inverse @ ((first @ d) * (second @ a)), expected, rtol=1e-12)
