"""Several processes by the command line: the same store, and nothing lost when one dies."""

import json
import os
import signal
import time

import numpy as np
import pytest
from command_line import Command, dmin

from dmin.collect import GradientCollector
from dmin.data.digits import Digits
from dmin.data.subset import Subset
from dmin.diffusion.timesteps import Stratified
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic
from dmin.store import Store
from dmin.workers.shard import Shard

# With a segment a block.
SETTINGS = [
    *("model=ddpm", "data=subset", "data@data.dataset=digits", "name=d"),
    *("sketch=block_cyclic", "sketch.dim=256", "timesteps.num=3"),
    *("collect.block_size=8", "collect.dtype=float32"),
    *("collect.segment_bytes=1", "extras.threads=1", "extras.print_config=false"),
]
RANKS = ["trainer=ddp", "trainer.accelerator=cpu"]


def command(ddpm_path, *settings):
    return ["collect", *SETTINGS, f"model.path={ddpm_path}", *settings]


@pytest.fixture(scope="module")
def collected(ddpm, tmp_path_factory):
    """What one process makes of so many digits, by the same settings."""

    def collect(count, path=None, **options):
        return GradientCollector(ddpm, BlockCyclic(256), Stratified(3)).collect(
            Subset(Digits("train"), count=count),
            path or tmp_path_factory.mktemp("one") / "store",
            block_size=8,
            dtype="float32",
            segment_bytes=1,
            **options,
        )

    return collect


def second_rank(path):
    """The process of rank 1 of the run at work on a store; None before it begins."""
    files = (path / "progress").glob(f"{Shard(rank=1, ranks=2).name}.*.json")
    found = [json.loads(file.read_text()) for file in files]
    return max(found, key=lambda each: each["started"])["pid"] if found else None


@pytest.mark.slow
def test_two_processes_in_a_sweep_make_the_store_of_one(ddpm_path, collected, tmp_path):
    # 52 examples are six blocks and a half for two processes; nine are one and an eighth.
    line = command(ddpm_path, *RANKS, "-m", "data.count=52,9")
    dmin(*line, cwd=tmp_path)
    found = [Store(path) for path in (tmp_path / "outputs/stores").iterdir()]
    assert {len(store): store.digest() for store in found} == {
        count: collected(count).digest() for count in (52, 9)
    }


@pytest.mark.slow
def test_a_killed_rank_is_told_and_leaves_a_store_that_resumes(ddpm_path, collected, tmp_path):
    path = tmp_path / "store"
    line = command(ddpm_path, *RANKS, "data.count=160", f"collect.path={path}")
    job = Command("-m", "dmin", *line, cwd=tmp_path, fork_ranks=False)  # as a user starts them
    end = time.monotonic() + 300
    try:
        while len(list(path.glob("segment-*"))) < 3 or not second_rank(path):
            assert job.poll() is None and time.monotonic() < end, "it did not begin"
            time.sleep(0.01)
        os.kill(second_rank(path), signal.SIGKILL)
        ended = job.wait(timeout=200)
    finally:
        job.kill()
    said = ended.stderr
    assert ended.returncode == 1
    assert "rank 1" in said and "was killed" in said and "Traceback" not in said
    store = Store(path)
    odd = [block for block in store.missing_blocks if block % 2]
    assert store.missing_blocks == odd  # the other one did all of its part
    assert collected(160, path).digest() == collected(160).digest()


@pytest.mark.slow
def test_a_sharded_network_stops_at_a_signal_and_at_a_death(ddpm_path, collected, tmp_path):
    # Each rank needs the other in every pass: both must end, whichever hears or dies.
    path = tmp_path / "store"
    sharded = ["trainer=fsdp", "trainer.accelerator=cpu", "data.count=120"]
    line = command(ddpm_path, *sharded, f"collect.path={path}")
    for what, status in ((signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, 1)):
        there = len(list(path.glob("segment-*")))
        job = Command("-m", "dmin", *line, cwd=tmp_path)
        try:
            end = time.monotonic() + 300
            while len(list(path.glob("segment-*"))) < there + 3:
                assert job.poll() is None and time.monotonic() < end, "it did not begin"
                time.sleep(0.01)
            os.kill(second_rank(path), what)
            ended = job.wait(timeout=120)
        finally:
            job.kill()
        said = ended.stderr
        assert ended.returncode == status and "Traceback" not in said, said
        assert not Store(path).complete
    assert "another process of this job was lost" in said
    whole, one = collected(120, path), collected(120)
    assert np.abs(whole.features("loss") - one.features("loss")).max() < 2e-6


def test_shards_make_the_store_of_one_and_the_last_says_so(collected, tmp_path):
    path = tmp_path / "store"
    for shard in (2, 0, 3):
        assert not collected(52, path, shard=shard, shards=4).complete
    before = {file: file.stat().st_mtime_ns for file in path.glob("segment-*")}
    collected(52, path, shard=2, shards=4)  # again: nothing to do
    assert {file: file.stat().st_mtime_ns for file in path.glob("segment-*")} == before
    whole = collected(52, path, shard=1, shards=4)
    assert whole.complete and whole.digest() == collected(52).digest()


def test_more_shards_than_blocks_leave_some_with_nothing(collected, tmp_path):
    for shard in range(3):
        store = collected(9, tmp_path / "s", shard=shard, shards=3)
    assert store.complete and store.digest() == collected(9).digest()


def test_a_shard_that_is_being_collected_is_not_collected_twice(collected, tmp_path):
    from dmin.workers.heartbeat import Heartbeat
    from dmin.workers.lock import claim

    collected(52, tmp_path / "s", shard=0, shards=4)
    other = Heartbeat(tmp_path / "s", Shard(1, 4))
    claim(other, 7)
    with pytest.raises(DminError, match=r"being collected by process .*shard 1 of 4.*shard\.num=n"):
        collected(52, tmp_path / "s", shard=1, shards=4)
    collected(52, tmp_path / "s", shard=2, shards=4)
