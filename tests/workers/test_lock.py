"""Of the processes that want the same work done one does it; the others wait, or refuse."""

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import filelock
import pytest

from dmin.runtime.errors import DminError
from dmin.runtime.signals import Stopped, StopSignals
from dmin.workers import heartbeat, liveness, lock as lock_module
from dmin.workers.heartbeat import Heartbeat
from dmin.workers.lock import claim, hold
from dmin.workers.shard import Shard

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock_module, "POLL", 0.02)


def refused(number: int):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


def make(path: Path, seconds: float, started, locks: Path | None) -> None:
    if locks is not None:  # as on a node of its own
        lock_module._lock_file = lambda folder: locks
    with hold(path, wait=60):
        if not path.exists():
            started.set()
            time.sleep(seconds)
            with (path.parent / "made").open("a") as file:
                file.write("once\n")
            path.touch()


@pytest.fixture
def spawn():
    processes = []

    def start(path, seconds, locks=None):
        event = FORK.Event()
        process = FORK.Process(target=make, args=(path, seconds, event, locks))
        process.start()
        processes.append(process)
        return process, event

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_one_makes_it_and_the_others_find_it(tmp_path, spawn):
    for process in [spawn(tmp_path / "store", 0.05)[0] for _ in range(5)]:
        process.join(60)
    assert (tmp_path / "made").read_text() == "once\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "store"]  # no claim is left


def test_claims_decide_where_each_node_has_a_lock_of_its_own(tmp_path, spawn):
    place = tmp_path / "shared"
    place.mkdir()
    nodes = [spawn(place / "store", 0.05, tmp_path / f"node-{n}.lock")[0] for n in range(4)]
    for process in nodes:
        process.join(60)
    assert (place / "made").read_text() == "once\n"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EROFS, errno.ENOSYS])
def test_claims_decide_where_there_are_no_locks(tmp_path, spawn, monkeypatch, number):
    monkeypatch.setattr(filelock.FileLock, "acquire", refused(number))
    for process in [spawn(tmp_path / "store", 0.05)[0] for _ in range(4)]:
        process.join(60)
    assert (tmp_path / "made").read_text() == "once\n"


@pytest.mark.parametrize("shards", [[Shard()] * 8, [Shard(), Shard(0, 2), Shard(1, 2)] * 3])
def test_without_locks_no_two_that_overlap_ever_hold(tmp_path, monkeypatch, shards):
    monkeypatch.setattr(filelock.FileLock, "acquire", refused(errno.ENOLCK))
    held, clashes = [], []

    def work(shard):
        for _ in range(2):
            with hold(tmp_path / "store", shard, wait=60):
                clashes.extend(other for other in held if other.overlaps(shard, 2))
                held.append(shard)
                time.sleep(0.003)
                held.remove(shard)

    threads = [threading.Thread(target=work, args=(shard,)) for shard in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert clashes == []


def test_a_claim_is_written_though_others_remove_the_folder_meanwhile(tmp_path, monkeypatch):
    write, removed = heartbeat.commit, []

    def commit(file, *content, **how):
        if len(removed) < 5:
            removed.append(file.parent.rmdir())
        write(file, *content, **how)

    monkeypatch.setattr(heartbeat, "commit", commit)
    with hold(tmp_path / "store", wait=1):
        assert len(list(tmp_path.glob(".store.claims/*/*.json"))) == 1 and len(removed) == 5


def test_waiting_ends_and_says_for_whom(tmp_path, spawn):
    process, started = spawn(tmp_path / "store", 60)
    assert started.wait(30)
    said = []
    with (
        pytest.raises(
            DminError, match=rf"process {process.pid} on .*since 2.*after 0\.2 s \(collect\.wait"
        ),
        hold(tmp_path / "store", wait=0.2, on_wait=said.append),
    ):
        pass
    assert len(said) == 1 and said[0].startswith("waiting for another job (")
    assert f"process {process.pid} on " in said[0] and said[0].endswith("store")


def test_a_signal_ends_the_waiting(tmp_path, spawn):
    _, started = spawn(tmp_path / "store", 60)
    assert started.wait(30)
    stop = StopSignals()
    stop.received.append(signal.SIGTERM)
    with pytest.raises(Stopped), hold(tmp_path / "store", wait=60, stop=stop):
        pass


def test_a_killed_job_holds_nothing(tmp_path, spawn):
    process, started = spawn(tmp_path / "store", 60)
    assert started.wait(30)
    process.kill()  # SIGKILL: its claim stays
    process.join()
    (left,) = liveness.reports(tmp_path / ".store.claims")
    assert left.dead
    start = time.monotonic()
    with hold(tmp_path / "store", wait=0):
        assert time.monotonic() - start < 10
    assert list(tmp_path.iterdir()) == []


def test_a_suspended_job_of_this_machine_keeps_what_it_holds(tmp_path, spawn):
    process, started = spawn(tmp_path / "store", 60)
    assert started.wait(30)
    os.kill(process.pid, signal.SIGSTOP)
    (file,) = (tmp_path / ".store.claims/progress").glob("*.json")
    os.utime(file, (0, 0))  # silent for long
    with pytest.raises(DminError, match="being made"), hold(tmp_path / "store", wait=0):
        pass


def test_a_job_of_another_machine_holds_while_its_file_changes(tmp_path):
    other = Heartbeat(tmp_path / ".store.claims", Shard(), every=0.1)
    claim(other, 1)
    document = json.loads(other.file.read_text())
    silent = threading.Event()

    def beat():
        while not silent.wait(0.02):  # whatever its clock says
            document["beat"] += 1
            new = other.file.with_name("new")
            new.write_text(json.dumps({**document, "machine": "other", "host": "far", "clock": 0}))
            new.replace(other.file)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(DminError, match="on far"), hold(tmp_path / "store", wait=0.3):
            pass
    finally:
        silent.set()
        thread.join()
    with hold(tmp_path / "store", wait=0):  # it fell silent
        pass


def test_shards_work_side_by_side_but_not_beside_a_whole_job(tmp_path):
    path = tmp_path / "store"
    first, second = (hold(path, Shard(number, 2), wait=0) for number in range(2))
    with first, second, pytest.raises(DminError), hold(path, wait=0):
        pass
    with hold(path, wait=0), pytest.raises(DminError), hold(path, Shard(0, 2), wait=0):
        pass


def test_what_was_left_over_is_in_nobodys_way(tmp_path):
    claims = tmp_path / ".store.claims"
    lock_module._lock_file(claims).touch()
    claim(Heartbeat(claims, Shard()), 1)
    (file,) = (claims / "progress").glob("*.json")
    file.write_text("of another version")
    with hold(tmp_path / "store", wait=0):
        pass


def test_where_nothing_can_be_written_there_is_nothing_to_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", refused(errno.EROFS))
    with hold(tmp_path / "store", wait=0), hold(tmp_path / "store", wait=0):
        pass
