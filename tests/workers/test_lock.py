"""Of the jobs that want one thing made, one makes it."""

import multiprocessing
import time
from pathlib import Path

import pytest

from dmin.runtime.errors import DminError
from dmin.workers import lock as turn_module
from dmin.workers.lock import hold


def make(path: str, seconds: float, started) -> None:
    with hold(Path(path), 60, print, poll=0.01):
        if not Path(path).exists():
            started.set()
            time.sleep(seconds)
            with (Path(path).parent / "made").open("a") as file:
                file.write("once\n")
            Path(path).touch()


@pytest.fixture
def spawn():
    context = multiprocessing.get_context("fork")
    started = []

    def start(*arguments):
        event = context.Event()
        process = context.Process(target=make, args=(*map(str, arguments[:1]), arguments[1], event))
        process.start()
        started.append(process)
        return process, event

    yield start
    for process in started:
        process.kill()
        process.join()


def test_one_makes_it_and_the_others_find_it(tmp_path, spawn):
    processes = [spawn(tmp_path / "store", 0.05)[0] for _ in range(5)]
    for process in processes:
        process.join(30)
    assert (tmp_path / "made").read_text() == "once\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "store"]  # no lock is left


def test_waiting_ends_and_says_for_whom(tmp_path, spawn):
    process, started = spawn(tmp_path / "store", 60)
    assert started.wait(30)
    said = []
    with (
        pytest.raises(DminError, match=rf"process {process.pid} on .*after 0\.2 s \(collect\.wait"),
        hold(tmp_path / "store", 0.2, said.append, poll=0.01),
    ):
        pass
    assert len(said) == 1 and "waiting for another job" in said[0]


def test_a_killed_job_holds_nothing(tmp_path, spawn):
    process, started = spawn(tmp_path / "store", 60)
    assert started.wait(30)
    process.kill()
    with hold(tmp_path / "store", 10, print, poll=0.01):
        pass


def test_shards_work_side_by_side_but_not_beside_a_whole_job(tmp_path):
    path = tmp_path / "store"
    shards = [hold(path, 0, print, shared=True) for _ in range(2)]
    with shards[0], shards[1], pytest.raises(DminError), hold(path, 0, print):
        pass
    with hold(path, 0, print), pytest.raises(DminError), hold(path, 0, print, shared=True):
        pass


def test_a_file_system_without_locks_does_not_stop_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(turn_module, "_try", lambda lock, mode: None)
    with hold(tmp_path / "store", 0, print), hold(tmp_path / "store", 0, print):
        pass
