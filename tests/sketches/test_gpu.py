"""Triton's kernels against the torch path in double precision: interpreted, or on a GPU.

Without a GPU they run where Triton is installed (pip install triton), in its interpreter, and are
compiled for one that is not there.
"""

import pytest
import torch
from oracle import settled
from torch import nn

from dmin.gradients.factors import Dense, Outer, Sum
from dmin.gradients.layers import layer_gradient
from dmin.gradients.parameters import Parameter, Parameters, choose_parameters
from dmin.runtime.errors import DminError
from dmin.sketches import Auto, BlockCyclic, Sketch, TensorSketch, backends
from dmin.sketches.backends import backend_for, check_kernels, cpu, gpu, gpu_tables
from dmin.sketches.hashing import hash_words

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
triton = pytest.mark.skipif(
    not backends.installed(), reason="Triton is not installed: pip install triton"
)


BATCH = 5  # is no multiple of what a program takes
LAYERS = {
    "tokens": (nn.Linear(300, 7), (4, 300)),
    "one row": (nn.Linear(70, 33), (70,)),
    "kernel": (nn.Conv2d(5, 6, 3, padding=1, stride=2), (5, 6, 5)),
    "circular": (nn.Conv1d(20, 9, 3, dilation=2, padding=1, padding_mode="circular"), (20, 8)),
    "volume": (nn.Conv3d(2, 9, 2, padding=1), (2, 3, 4, 3)),
    "groups": (nn.Conv2d(6, 10, 3, groups=2), (6, 4, 4)),
    "transposed": (nn.ConvTranspose2d(6, 10, 3, stride=2), (6, 3, 3)),
    "looked up": (nn.Embedding(40, 12), (6,)),
    "norm": (nn.LayerNorm(600), (3, 600)),
}
MAPS = {  # several tiles of buckets and one; blocks that rows end in; sides longer than the sketch
    "block 256": lambda: BlockCyclic(1280),
    "block 20": lambda: BlockCyclic(100, block=20),
    "tensor": lambda: TensorSketch(1024),
    "tensor, long sides": lambda: TensorSketch(32, block=32),
}


def factors_of(layer: str, dtype: torch.dtype = torch.float32):
    """Weight factors of two calls of a layer, as backward hands them on."""
    generator = torch.Generator().manual_seed(0)
    module, shape = LAYERS[layer]
    module = module.to(DEVICE, dtype)
    found = []
    for _ in range(2):
        x = torch.randn(BATCH, *shape, generator=generator).to(DEVICE, dtype)
        if isinstance(module, nn.Embedding):
            x = torch.randint(40, (BATCH, *shape), generator=generator).to(DEVICE)
        with torch.no_grad():
            d = torch.randn(module(x).shape, generator=generator).to(DEVICE, dtype)
        found.append(layer_gradient(module)(module, x, d, BATCH)["weight"])
    return found


def rows_of(sketch: Sketch, factors, budget: int = 60_000):
    """Rows of the second of two groups, so that they do not lie side by side."""
    state = sketch.begin(factors.batch, torch.zeros((), device=DEVICE), budget)
    sketch.add(state, "w", factors)
    found = sketch.finish(state)
    assert not found.values[:, 0].any()
    return found.values[:, 1], found.squared_norm[:, 1]


def bound(sketch: Sketch, shape, kernels: str = "triton") -> Sketch:
    entries = Parameter("w", tuple(shape), 1), Parameter("other", (1300,), 0)
    sketch = sketch.bind(Parameters(entries, ("first", "second")))
    sketch.kernels = kernels
    return sketch


def held_to_the_torch_path(layer, map_of, cheaper, monkeypatch, dtype=torch.float32):
    monkeypatch.setattr(TensorSketch, "_transforms_are_cheaper", lambda *_: cheaper)
    once, again = factors_of(layer, dtype)
    for factors in (once, Sum([once, again])):
        formed = factors.dense().double()
        sketch = bound(MAPS[map_of](), formed.shape[1:])
        found, norms = rows_of(sketch, factors)
        expected = sketch.of({"w": formed})[:, 1]
        assert (found - expected).norm() <= 2e-6 * expected.norm()
        if sketch.norm_kind == "exact":
            truth = formed.flatten(1).square().sum(1).float()
            torch.testing.assert_close(norms, truth, rtol=1e-5, atol=0)


@triton
@pytest.mark.parametrize(
    ("map_of", "cheaper"), [(name, way) for name in MAPS for way in (False, True)][1:]
)
@pytest.mark.parametrize("layer", ["tokens", "kernel", "groups"])
def test_rows_are_those_of_torch_in_double_precision(layer, map_of, cheaper, monkeypatch):
    held_to_the_torch_path(layer, map_of, cheaper, monkeypatch)


@triton
@pytest.mark.parametrize("layer", [name for name in LAYERS if name not in ("tokens", "kernel")])
def test_every_layer_type(layer, monkeypatch):
    held_to_the_torch_path(layer, "block 256", True, monkeypatch)
    held_to_the_torch_path(layer, "tensor", True, monkeypatch)


@triton
def test_half_precision_is_summed_in_single(monkeypatch):
    held_to_the_torch_path("tokens", "block 256", True, monkeypatch, torch.bfloat16)
    held_to_the_torch_path("tokens", "tensor", True, monkeypatch, torch.bfloat16)


@triton
@pytest.mark.parametrize("map_of", ["block 256", "tensor"])
def test_bits_do_not_depend_on_batch_or_budget(map_of):
    gradient = torch.randn(BATCH, 30, 500, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sketch = bound(MAPS[map_of](), (30, 500))
    rows, norms = rows_of(sketch, Dense(gradient), 1 << 30)
    again, _ = rows_of(sketch, Dense(gradient), 1)
    assert torch.equal(rows, again)
    alone, norm = rows_of(sketch, Dense(gradient[3:4]))
    assert torch.equal(rows[3:4], alone)
    assert sketch.norm_kind == "sketch" or torch.equal(norms[3:4], norm)


@triton
def test_transforms_in_pieces_give_the_same_rows(monkeypatch):
    d, a = (torch.randn(3, 21, n, generator=torch.Generator().manual_seed(n)) for n in (40, 50))
    monkeypatch.setattr(TensorSketch, "_transforms_are_cheaper", lambda *_: True)
    sketch = bound(TensorSketch(256), (40, 50))
    whole, _ = rows_of(sketch, Outer(d.to(DEVICE), a.to(DEVICE)))
    monkeypatch.setattr(gpu, "CACHED", 16 * 256 * 8)  # 8 positions at a time
    torch.testing.assert_close(rows_of(sketch, Outer(d.to(DEVICE), a.to(DEVICE)))[0], whole)


@triton
def test_the_kernels_hash_as_torch_does():
    for key in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
        found = gpu.hashed_words(key, 3000, DEVICE).long() & 0xFFFFFFFF
        assert torch.equal(found.cpu(), hash_words(key, 3000))


def test_blocks_that_reach_a_tile_are_all_found_and_no_other(monkeypatch):
    monkeypatch.setattr(gpu_tables, "TILE", 64)
    for dim, block in ((300, 20), (256, 64), (128, 64), (100, 100), (64, 3)):
        offsets = torch.randint(dim, (200,), generator=torch.Generator().manual_seed(dim))
        blocks = gpu_tables.sorted_blocks(offsets, dim, block)
        assert torch.equal(offsets[blocks.order].int(), blocks.offset)
        for tile, (first, count) in enumerate(zip(blocks.first, blocks.reaching, strict=True)):
            found = blocks.order[(first + torch.arange(int(count))) % 200]
            buckets = (offsets[:, None] + torch.arange(block)) % dim
            reaches = (buckets // gpu_tables.tile_of(dim) == tile).any(1)
            assert len(set(found.tolist())) == count
            assert set(reaches.nonzero()[:, 0].tolist()) <= set(found.tolist())
            if gpu_tables.tile_of(dim) + block <= dim:
                assert int(reaches.sum()) == count


def test_what_cannot_be_asked_for():
    with pytest.raises(DminError, match=r"kernels='cuda': allowed are auto .*triton, and torch"):
        check_kernels("cuda")


def test_triton_is_refused_where_it_cannot_be(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "installed", lambda: False)
    with pytest.raises(
        DminError, match=r"kernels=triton, but Triton is not installed.*pip install"
    ):
        check_kernels("triton")
    with pytest.raises(DminError, match=r"kernels=triton, but the rows are on cpu.*kernels=auto"):
        backend_for(torch.zeros(1), "triton", 1)
    assert isinstance(backend_for(torch.zeros(1), "auto", 1), cpu.CpuBackend)


def test_torch_alone_gives_the_rows_of_the_compiled_loops(monkeypatch):
    once, _ = factors_of("tokens")
    for sketch in (BlockCyclic(1280), TensorSketch(1024), Auto(1024)):
        auto, _ = rows_of(bound(sketch, (7, 300), "auto"), once)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "kernels", lambda: pytest.fail("compiled loops were used"))
            torch.testing.assert_close(rows_of(bound(sketch, (7, 300), "torch"), once)[0], auto)


ARGUMENTS = {  # of the kernels, where they are no 32-bit integers
    "gradient": "*bf16", "x": "*bf16", "sign": "*fp32", "sign_of": "*fp32", "partial": "*fp32",
    "squares": "*fp32", "counted": "*fp32", "left": "*fp32", "right": "*fp32", "spectrum": "*fp32",
    "words": "*i32", "order": "*i32", "offset": "*i32", "first": "*i32", "count": "i32",
    "shift": "*i32", "column_of": "*i32",
}  # fmt: skip
SIZES = {"BLOCK": 256, "EXAMPLES": 4, "TILE": 512, "MEASURE": True, "ROWS": 4, "STEP": 8}


@triton
@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_and_add_nothing_by_atomics():
    """In a process of its own: in this one they are interpreted."""
    import os
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == 5


def compile_all() -> None:
    import re

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dmin.sketches.backends import gpu_kernels

    for name in ("hash_words", "fold_blocks", "fold_rows", "count_sketch", "add_products"):
        kernel = getattr(gpu_kernels, name)
        signature = {x: ARGUMENTS.get(x, "i32") for x in kernel.arg_names}
        if name == "fold_blocks":
            signature["count"] = "*i32"
        sizes = {(i,): SIZES[x] for i, x in enumerate(kernel.arg_names) if x in SIZES}
        signature |= {kernel.arg_names[i]: "constexpr" for (i,) in sizes}
        source = ASTSource(fn=kernel, signature=signature, constexprs=sizes)
        assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", assembly), name
        print("compiled", name)


if __name__ == "__main__":
    compile_all()


# On a GPU.


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(8, 64)
        self.wide, self.narrow = nn.Linear(64, 4096), nn.Linear(4096, 64)

    def forward(self, x):
        y = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        return self.narrow(torch.tanh(self.wide(y))).square().mean((1, 2))


def captured(kernels, device, dtype=torch.float32, sketch=None):
    torch.manual_seed(0)
    network, x = Network().to(device, dtype), torch.randn(BATCH, 3, 8, 8).to(device, dtype)
    sketch = (sketch or Auto(4096)).bind(choose_parameters(network))
    sketch.kernels = kernels
    return settled(network, sketch, lambda c: c.backward(network(x)).values.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("sketch", [Auto, BlockCyclic, TensorSketch])
def test_a_gpu_gives_the_rows_of_a_cpu_and_the_same_bits_each_time(sketch, kernels):
    found = captured(kernels, "cuda", sketch=sketch(4096))
    expected = captured("torch", "cpu", torch.float64, sketch(4096))
    assert (found - expected).norm() <= 1e-4 * expected.norm()  # the network rounds as well
    assert torch.equal(found, captured(kernels, "cuda", sketch=sketch(4096)))


@pytest.mark.gpu
def test_half_precision_on_a_gpu():
    found = captured("triton", "cuda", torch.bfloat16)
    expected = captured("torch", "cuda", torch.bfloat16)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
