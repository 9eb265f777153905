"""How much fits: sizes found by trying, noted for the whole store; what a collection takes."""

import json

import pytest
import torch
from latent_model import Latent
from toy_ddpm import TINY_UNET

from dmin.collect import GradientCollector, microbatch as memory, peak_memory, predict_trainer
from dmin.collect.microbatch import agree_on_microbatch, examined_size, find_microbatch, note_of
from dmin.diffusion.timesteps import Stratified
from dmin.models.families.ddpm import DDPM
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic

CPU = torch.device("cpu")


def make(model, **changes):
    return GradientCollector(model, BlockCyclic(256), Stratified(2), **changes)


def run(collector, dataset, path, **options):
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    return collector.collect(dataset, path, block_size=8, trainer=trainer, **options)


@pytest.fixture
def clock(monkeypatch):
    """A machine on which a pass takes what `attempt` says: seconds and bytes."""

    class Machine:
        now, peak = 0.0, 1000

        def __init__(self, seconds, taken):
            self.seconds, self.taken, self.tried = seconds, taken, []

        def __call__(self, size):
            self.tried.append(size)
            Machine.now += self.seconds(size)
            Machine.peak = max(Machine.peak, 1000 + self.taken(size))

    monkeypatch.setattr(memory.time, "perf_counter", lambda: Machine.now)
    monkeypatch.setattr(peak_memory, "peak_resident", lambda: Machine.peak)
    return Machine


def test_sizes_grow_until_the_limit(clock):
    machine = clock(lambda n: 1.0, lambda n: 10 * n)
    assert find_microbatch(machine, 64, CPU, limit=100) == 8
    assert machine.tried == [1, 1, 2, 4, 8, 16]


def test_sizes_grow_until_they_pay_no_more(clock):
    machine = clock(lambda n: 1.0 + n, lambda n: n)
    found = find_microbatch(machine, 1000, CPU)
    assert (1 + 2 * found) / (2 * found) > (1 + found) / found / 1.05 and found < 64


def test_sizes_end_with_the_work(clock):
    assert find_microbatch(clock(lambda n: 1.0, lambda n: n), 11, CPU) == 8


def test_one_pair_beyond_the_limit_is_refused(clock):
    with pytest.raises(DminError, match=r"takes 500 bytes, more than the limit of 100.*collect\."):
        find_microbatch(clock(lambda n: 1.0, lambda n: 500), 8, CPU, limit=100)


def test_running_out_of_gpu_memory_keeps_the_size_before(clock):
    def attempt(size):
        clock.now += 1
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert find_microbatch(attempt, 64, CPU) == 4


@pytest.mark.parametrize(
    ("by_data", "a_pair", "found"), [(True, 3, 1), (True, 0.1, 8), (False, 3, 8)]
)
def test_pairs_are_run_alone_where_that_costs_less_than_examining(clock, by_data, a_pair, found):
    def run(ownership, size):
        if by_data:
            ownership.route()
        clock.now += 1 + a_pair * size * (1 if size == 1 else 3)  # three passes, to examine it

    assert examined_size(run, 8, CPU) == found


def test_the_first_note_decides(tmp_path):
    path = note_of(tmp_path / "store", CPU, manifest="abc", memory=None)
    assert agree_on_microbatch(path, lambda: 16) == 16
    assert agree_on_microbatch(path, lambda: pytest.fail("found again")) == 16

    def raced():  # another process notes its own meanwhile
        other.write_text(json.dumps({"microbatch": 4}))
        return 32

    other = note_of(tmp_path / "store", CPU, manifest="abc", memory=10)
    assert other != path and agree_on_microbatch(other, raced) == 4
    path.write_text("{}")
    with pytest.raises(DminError, match=r"microbatch-.*is damaged.*Delete it"):
        agree_on_microbatch(path, lambda: 1)


def test_auto_finds_one_size_for_the_whole_store(ddpm, digits, tmp_path, monkeypatch):
    fixed = run(make(ddpm), digits, tmp_path / "fixed")
    collector = make(ddpm, microbatch="auto")
    store = run(collector, digits, tmp_path / "auto", segment_bytes=1)
    (note,) = tmp_path.glob("auto.microbatch-*.json")
    digest = store.digest()
    # The same bits as of that size, said beforehand.
    found = json.loads(note.read_text())["microbatch"]
    assert run(make(ddpm, microbatch=found), digits, tmp_path / "said").digest() == digest
    difference = store.features("loss") - fixed.features("loss")
    assert abs(difference).max() < 2e-3  # float16 rows
    for segment in sorted((tmp_path / "auto").glob("segment-*"))[1:]:
        segment.unlink()
    monkeypatch.setattr("dmin.collect.session.find_microbatch", lambda *_: pytest.fail("again"))
    assert run(make(ddpm, microbatch="auto"), digits, tmp_path / "auto").digest() == digest


@pytest.mark.parametrize("wrong", [0, -1, "automatic"])
def test_other_sizes_are_refused(ddpm, wrong):
    with pytest.raises(DminError, match=f"microbatch={wrong}: give auto, or a number"):
        make(ddpm, microbatch=wrong)


def test_running_out_in_a_block_says_what_helps(ddpm, digits, tmp_path, monkeypatch):
    def out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DDPM, "predict", out)
    with pytest.raises(DminError, match=r"64 pairs.*collect\.gradient_checkpointing=true"):
        run(make(ddpm), digits, tmp_path / "s")


def test_gradient_checkpointing_agrees_and_is_switched_off_again(ddpm, digits, tmp_path):
    plain = run(make(ddpm), digits, tmp_path / "plain", dtype="float32").features("loss")
    network = DDPM.build(TINY_UNET, {"beta_schedule": "squaredcos_cap_v2"}).eval()
    network.load_state_dict(ddpm.state_dict())
    seen = []
    network.network.register_forward_pre_hook(
        lambda module, args: seen.append(module.is_gradient_checkpointing)
    )
    collector = make(network, gradient_checkpointing=True)
    found = run(collector, digits, tmp_path / "s", dtype="float32").features("loss")
    assert abs(found - plain).max() < 1e-5
    assert all(seen) and not network.network.is_gradient_checkpointing


def test_a_network_without_checkpointing_is_refused(digits, tmp_path):
    collector = GradientCollector(
        Latent(), BlockCyclic(32, block=16), Stratified(2), gradient_checkpointing=True
    )
    with pytest.raises(DminError, match="Sequential does not support it"):
        run(collector, digits, tmp_path / "s")


def test_peak_memory_says_what_it_is(ddpm, digits, tmp_path):
    collector = make(ddpm)
    run(collector, digits, tmp_path / "s")
    assert collector.peak.bytes >= 0
    assert collector.peak.meaning.startswith("growth of the process's peak resident memory")
