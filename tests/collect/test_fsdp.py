"""One network for several processes: what it gives is what the whole network gives."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Command
from models.families import LATER, checkpoint
from sharded_worker import collect, examples, load
from torch import nn

from dmin.collect import GradientCollector, predict_trainer
from dmin.collect.fsdp import Sharded, units
from dmin.diffusion.timesteps import Stratified
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic
from dmin.store import Store

TESTS = Path(__file__).parents[1]
# Of rows of unit length. What is put together is the weights' own bits, but it lies elsewhere in
# memory, and kernels round by that.
TOLERANCE = 2e-6
# Convolutions; parameters of a block and of the network; a layer of a block called outside of it;
# weights that a module around their layer uses.
NAMES = ("ddpm", "pixart", "dit", "hunyuan_dit")
if os.environ.get("DMIN_CONFORMANCE"):
    # Of two networks that share out the timesteps, processes may not share both.
    NAMES += tuple(name for name in LATER if name != "wan_2_2")
MIXED = "stable_diffusion"  # its UNet takes any shape


def job(name, model, path, **changes):
    # Nine examples in blocks of four, passes of half a block: of two processes one has a block
    # more, of one row and a single pass.
    told = {"name": name, "model": str(model), "path": str(path), "count": 9, "devices": 2}
    return {**told, "offload": False, "changes": {}, **changes}


def run(*jobs):
    done = Command(TESTS / "sharded_worker.py", json.dumps(jobs)).wait(timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def assert_same(found, expected):
    assert found.complete and found.manifest.fingerprint == expected.manifest.fingerprint
    rows, other = (s.features("loss", 0, len(s)) for s in (found, expected))
    assert np.abs(rows - other).max() < TOLERANCE
    assert np.allclose(found.losses(), expected.losses(), rtol=1e-5)
    assert np.allclose(found.norms("loss"), expected.norms("loss"), rtol=1e-4)


@pytest.fixture(scope="module")
def places(ddpm_path):
    return {"ddpm": ddpm_path, **{name: checkpoint(name) for name in (*NAMES[1:], MIXED)}}


@pytest.fixture(scope="module")
def sharded(places, tmp_path_factory):
    """Stores of two processes each."""
    folder = tmp_path_factory.mktemp("sharded")
    run(*(job(name, places[name], folder / name) for name in NAMES))
    return folder


@pytest.fixture(scope="module")
def unusual(places, tmp_path_factory):
    """The same in other ways, and of few examples: one process has no block at all."""
    folder = tmp_path_factory.mktemp("unusual")
    jobs = [job("ddpm", places["ddpm"], folder / "few", count=3)]
    jobs.append(job("ddpm", places["ddpm"], folder / "offload", offload=True))
    mixed = {"mixed": True}
    jobs.append(job(MIXED, places[MIXED], folder / "mixed", changes=mixed))
    again = {"gradient_checkpointing": True}
    jobs.append(job("dit", places["dit"], folder / "recomputed", changes=again))
    run(*jobs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_the_whole_network(name, places, sharded, tmp_path):
    whole = collect(name, load(name, places[name]), tmp_path / "whole", 9)
    assert_same(Store(sharded / name), whole)


@pytest.mark.slow
def test_activations_may_be_recomputed(places, unusual, tmp_path):
    whole = collect("dit", load("dit", places["dit"]), tmp_path / "whole", 9)
    assert_same(Store(unusual / "recomputed"), whole)


@pytest.mark.slow
def test_images_of_several_shapes_keep_step(places, unusual, tmp_path):
    # Blocks are cut into passes of one shape: two processes have different numbers of them.
    model = load(MIXED, places[MIXED])
    assert_same(Store(unusual / "mixed"), collect(MIXED, model, tmp_path / "one", 9, mixed=True))


@pytest.mark.slow
def test_a_process_without_a_block_of_its_own_keeps_step(places, unusual, tmp_path):
    whole = collect("ddpm", load("ddpm", places["ddpm"]), tmp_path / "whole", 3)
    assert_same(Store(unusual / "few"), whole)


@pytest.mark.slow
def test_weights_may_wait_in_host_memory(places, unusual, tmp_path):
    whole = collect("ddpm", load("ddpm", places["ddpm"]), tmp_path / "whole", 9)
    assert_same(Store(unusual / "offload"), whole)
    run(job("ddpm", places["ddpm"], tmp_path / "alone", offload=True, devices=1))
    assert_same(Store(tmp_path / "alone"), whole)


def test_trying_sizes_is_refused(ddpm, tmp_path):
    trainer = predict_trainer(accelerator="cpu", strategy=Sharded(), enable_progress_bar=False)
    collector = GradientCollector(ddpm, microbatch="auto")
    with pytest.raises(DminError, match=r"microbatch=auto.*such as collect\.microbatch=8"):
        collector.collect(examples("ddpm", 2), tmp_path / "s", trainer=trainer)
    assert not (tmp_path / "s").exists()


def test_units_are_blocks_and_leave_tied_weights_together():
    network = nn.Module()
    network.blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))) for _ in range(3)
    )
    network.layers = nn.ModuleList([nn.Linear(8, 8)])  # no block: its output is changed in place
    assert units(network) == list(network.blocks)[::-1]
    network.blocks[0][0].weight = network.blocks[2][0].weight
    assert units(network) == [network.blocks[1]]


@pytest.mark.gpu
def test_weights_in_host_memory_leave_the_gpu_free(places, tmp_path):
    trainer = predict_trainer(accelerator="gpu", strategy=Sharded(offload=True))
    model = load("dit", places["dit"])
    size = sum(p.numel() * p.element_size() for p in model.network.parameters())
    collector = GradientCollector(model, BlockCyclic(256), Stratified(2), microbatch=1)
    torch.cuda.reset_peak_memory_stats()
    collector.collect(examples("dit", 2), tmp_path / "s", trainer=trainer)
    assert all(p.device.type == "cpu" for p in model.network.parameters())
    assert torch.cuda.memory_allocated() < size
