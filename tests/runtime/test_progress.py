"""What long work shows of itself."""

import re
from types import SimpleNamespace

import pytest

from dmin.cli.workspace.benchmark import _lines
from dmin.collect.progress_bar import CollectionProgress
from dmin.runtime import progress as module
from dmin.runtime.formatting import span
from dmin.runtime.progress import LOG_WIDTH, console, followed


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


BLOCK = [{"id": ["x"] * 20}, {"id": ["y"] * 12}]


def collected(clock, blocks, world=1, seconds=1.0):
    shown = CollectionProgress(blocks * 32)
    shown.on_predict_epoch_start(SimpleNamespace(world_size=world), None)
    for _ in range(blocks):
        clock[0] += seconds
        shown.on_predict_batch_end(None, None, (0, print), BLOCK)
        shown.on_predict_batch_end(None, None, (0, None), BLOCK)  # done to keep step: not its own
    return shown


def test_a_log_file_gets_few_lines_with_rate_and_time_left(clock, capsys):
    collected(clock, 20_000, world=8)
    lines = capsys.readouterr().out.splitlines()
    assert 10 < len(lines) < 60  # of five and a half hours
    assert lines[0] == (
        "gradients: 480 of 640,000 examples in process 0 of 8 (0.1%), 32 a second, 5 h 33 min left"
    )
    assert lines[-1].endswith("640,000 of 640,000 examples in process 0 of 8 (100.0%), "
                              "32 a second in 5 h 33 min")  # fmt: skip


def test_other_processes_print_nothing(clock, capsys):
    shown = CollectionProgress(32)
    shown.disable()
    shown.on_predict_epoch_start(SimpleNamespace(world_size=2), None)
    clock[0] += 100
    shown.on_predict_batch_end(None, None, (0, print), BLOCK)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    collected(clock, 2).on_predict_end(None, None)
    assert re.search(r"gradients .*64/64.* 32/s", capsys.readouterr().out)


def test_times_are_said_in_two_units():
    assert [span(s) for s in (8, 750, 4980, 97200)] == ["8 s", "12 min", "1 h 23 min", "1 d 3 h"]


def test_items_are_followed_by_lines_in_a_log_file(clock, capsys):
    for _ in followed(range(100), "encoding", 100, "blocks"):
        clock[0] += 1
    assert capsys.readouterr().out.splitlines() == [
        "encoding: 15 of 100 blocks (15.0%), 1 a second, 1 min left",
        "encoding: 45 of 100 blocks (45.0%), 1 a second, 55 s left",
        "encoding: 100 of 100 blocks (100.0%), 1 a second in 2 min",
    ]


def test_a_benchmark_in_a_log_file_tells_of_what_it_does_and_not_of_what_it_found(clock, capsys):
    told = _lines(SimpleNamespace(notes=console()))
    told("retraining", 64, 64)  # all of it was there
    for done in (32, 40, 64):  # 32 were there
        told("retraining: seed 1", done, 64)
        clock[0] += 8
    told("retraining: seed 2", 0, 64)  # another piece of work under the same name
    clock[0] += 20
    told("retraining: seed 2", 16, 64)
    assert capsys.readouterr().out.splitlines() == [
        "retraining: 64 of 64 (100.0%), 2 a second in 16 s",
        "retraining: 16 of 64 (25.0%), 0.8 a second, 1 min left  seed 2",
    ]


def test_tables_of_a_log_file_are_wide_unless_columns_says_otherwise(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == LOG_WIDTH
    monkeypatch.setenv("COLUMNS", "72")
    assert console().width == 72


def test_progress_moves_within_a_block(clock, capsys):
    shown = CollectionProgress(64, points=10)
    shown.on_predict_epoch_start(SimpleNamespace(world_size=1), None)
    for _ in range(4):
        clock[0] += 20
        shown.pass_done(64)
    line = "gradients: 19 of 64 examples (30.0%), 0.32 a second, 2 min left"
    assert capsys.readouterr().out.splitlines()[1] == line
    shown.on_predict_batch_end(None, None, (0, print), BLOCK)
    assert shown.done == 32
