"""Heartbeats: who may begin, who is dead, and what is said of it."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from dmin.runtime.errors import DminError
from dmin.workers import heartbeat as progress, liveness as reports_module
from dmin.workers.heartbeat import Heartbeat
from dmin.workers.liveness import LivenessMonitor, reports
from dmin.workers.lock import claim
from dmin.workers.shard import Shard

WHOLE = Shard()


def path_of(store, share=WHOLE):
    (path,) = (store / "progress").glob(f"{share.name}.*.json")
    return path


def rewrite(store, share=WHOLE, **changes):
    path = path_of(store, share)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def quick(monkeypatch):
    for module in (progress, reports_module):
        monkeypatch.setattr(module, "EVERY", 0.1)


def test_shards_part_the_blocks_and_ranks_part_what_is_pending():
    for units, shards in ((10, 3), (2, 4), (64, 64), (7, 1)):
        parts = [list(Shard(i, shards).range(units)) for i in range(shards)]
        assert [unit for part in parts for unit in part] == list(range(units))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert Shard(1, 3).pending([0, 4, 5, 9], 10) == [4, 5]


def test_shares_overlap_only_where_they_may_do_the_same():
    share = Shard(1, 4, 0, 2)
    assert share.overlaps(share, 8) and share.overlaps(Shard(), 8)
    assert not share.overlaps(Shard(1, 4, 1, 2), 8)  # the rank beside it
    assert not share.overlaps(Shard(2, 4), 8)
    assert share.overlaps(Shard(0, 2), 8) and not share.overlaps(Shard(1, 2), 8)
    assert Shard.named(f"{share.name}.0f.json") == share and Shard.named("manifest.json") is None


@pytest.mark.parametrize("shard", [-1, 4])
def test_a_shard_that_does_not_exist_is_refused(shard):
    with pytest.raises(DminError, match=rf"shard\.id={shard}.*from 0 to 3.*--array=0-3"):
        Shard(shard, 4)


def test_a_process_tells_how_far_it_is_and_how_it_ended(tmp_path):
    with pytest.raises(ValueError), Heartbeat(tmp_path, Shard()) as progress:
        claim(progress, 4)
        progress.begin(4)
        progress.block_done(32)
        (now,) = reports(tmp_path)
        assert (now.state, now.blocks, now.pid) == ("collecting", 4, os.getpid()) and now.running
        raise ValueError("a bad image")
    (end,) = reports(tmp_path)
    assert (end.state, end.note, end.done, end.rows) == ("failed", "a bad image", 1, 32)
    assert end.ended and not end.running


def test_a_second_process_at_the_same_blocks_is_refused_and_beside_it_not(tmp_path):
    first = Heartbeat(tmp_path, Shard(0, 2))
    claim(first, 4)
    with pytest.raises(DminError, match=r"collected by .*computes shard 0 of 2 .*\(the whole\)"):
        claim(Heartbeat(tmp_path, Shard()), 4)
    claim(Heartbeat(tmp_path, Shard(1, 2)), 4)


def test_of_many_at_once_one_begins(tmp_path):
    refused = []

    def begin():
        try:
            claim(Heartbeat(tmp_path, Shard()), 4)
        except DminError as error:
            refused.append(error)

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 5


def test_a_killed_process_gives_way_at_once(tmp_path):
    killed = f"""
import os, signal
from pathlib import Path
from dmin.workers.heartbeat import Heartbeat
from dmin.workers.lock import claim
from dmin.workers.shard import Shard
claim(Heartbeat(Path({str(tmp_path)!r}), Shard()), 4)
os.kill(os.getpid(), signal.SIGKILL)"""
    subprocess.run([sys.executable, "-c", killed], timeout=60)
    (left,) = reports(tmp_path)
    assert left.dead and not left.running
    claim(Heartbeat(tmp_path, Shard()), 4)
    assert reports(tmp_path)[0].pid == os.getpid()


def test_a_process_of_another_machine_counts_as_alive_while_its_file_changes(tmp_path, quick):
    claim(Heartbeat(tmp_path, Shard(), every=0.05), 4)
    rewrite(tmp_path, machine="another", host="far", beat=7)
    left = threading.Event()

    def lives():
        beat = 7
        while not left.wait(0.01):
            rewrite(tmp_path, beat=(beat := beat + 1))

    thread = threading.Thread(target=lives)
    thread.start()
    with pytest.raises(DminError, match="on far"):
        claim(Heartbeat(tmp_path, Shard()), 4)
    left.set()
    thread.join()
    claim(Heartbeat(tmp_path, Shard()), 4)  # it fell silent


def test_clocks_that_are_apart_do_not_make_the_living_dead(tmp_path):
    claim(Heartbeat(tmp_path, Shard()), 4)
    rewrite(tmp_path, machine="another", clock=0.0)
    (report,) = reports(tmp_path)
    assert report.running and report.age < 60 and report.ahead < -1e9


def test_a_watch_sees_who_is_lost_and_why(tmp_path, quick, monkeypatch):
    shares = Shard(ranks=4).job
    ranks = [Heartbeat(tmp_path, share, every=0.02) for share in shares]
    for rank in ranks:
        claim(rank, 4)
        rank.joins("run")
    rewrite(tmp_path, shares[1], pid=2**22 + 1)
    rewrite(tmp_path, shares[2], machine="another")
    path_of(tmp_path, shares[3]).unlink()
    monkeypatch.setattr(reports_module, "SILENT", 3)
    watch = LivenessMonitor(tmp_path, "run", shares)
    lost = {}
    while len(lost) < 3:
        ranks[0].say(state="collecting")
        lost = watch.look()[1]
    assert shares[0] not in lost and "was killed" in lost[shares[1]]
    assert "no heartbeat" in lost[shares[2]]
    assert "never gave a heartbeat" in lost[shares[3]]


def test_a_living_process_that_does_nothing_is_lost_as_well(tmp_path, monkeypatch):
    progress = Heartbeat(tmp_path, Shard())
    claim(progress, 4)
    monkeypatch.setattr(reports_module, "STUCK_SECONDS", 0.0)
    watch = LivenessMonitor(tmp_path, progress.run, [Shard()])
    while not (lost := watch.look()[1]):
        progress.say(state="collecting")
    assert "no block" in lost[Shard()]


def test_what_was_said_is_kept_line_by_line(tmp_path, quick):
    for _ in range(2):
        with Heartbeat(tmp_path, WHOLE) as progress:
            claim(progress, 3)
            progress.begin(3)
            progress.block_done(8)
            progress.say(state="waiting")
    lines = (tmp_path / "progress" / f"{WHOLE.name}.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [line["state"] for line in told] == 2 * ["starting", "collecting", "waiting", "finished"]
    assert told[-1]["rows"] == 8 and len({line["run"] for line in told}) == 2
    assert len(reports(tmp_path)) == 1  # the log is no report


def test_a_store_that_was_deleted_stays_deleted(tmp_path):
    store = tmp_path / "s"
    progress = Heartbeat(store, Shard())
    progress.begin(4)
    assert path_of(store).is_file()
    shutil.rmtree(store)
    progress.block_done(3)
    assert not store.exists()
    store.mkdir()  # made again by another
    progress.say(state="collecting")
    assert path_of(store).is_file()
