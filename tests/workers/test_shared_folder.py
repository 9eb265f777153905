"""In a folder that others write to nothing delays a worker, and nothing ends it."""

import json
import os
import time

import pytest
from attribution.made_stores import drawn, made

from dmin.cli import main
from dmin.runtime.errors import DminWarning
from dmin.workers import liveness, lock as lock_module
from dmin.workers.heartbeat import Heartbeat
from dmin.workers.liveness import FOLDER, LivenessMonitor, machine_here, reports
from dmin.workers.lock import claim, hold
from dmin.workers.shard import WHOLE, Shard

NAME = f"{WHOLE.name}.0123abcd.json"
SAID = {
    **{"run": "theirs", "state": "collecting", "host": "h", "pid": 7, "machine": "m", "born": "1"},
    **{"job": "", "started": "s", "clock": 0.0, "every": 10.0, "blocks": 8, "done": 1},
}
DAMAGED = {
    "empty": b"",
    "cut off": b'{"run": "a',
    "no JSON": b"\x00\xff",
    "a list": b"[]",
    "a list of names": b'["run", "state"]',
    "null": b"null",
    "a number": b"1",
    "deep": b"[" * 60_000,
    "huge": b" " * (64 << 20),
    "a huge number": b'{"pid": ' + b"9" * 5000 + b"}",
    "nothing said": b"{}",
}
WRONG = {
    "pid": ["7", None, -1, 1.5, True, "../../etc"],
    "every": ["a", None, float("nan"), float("inf"), -1.0, 10**18],
    "clock": ["a", float("inf"), -1.0],
    "beat": [None, "1", 1.5, -1, 10**30],
    "blocks": [None, -1, 10**30, "x"],
    "done": [-5, None],
    "rate": [float("inf"), float("nan"), "x", -1.0],
    "state": [None, 3, [], "x" * 10_000],
    "run": [None, 3, {}],
    "note": [None, 4, "x" * 60_000],
    "host": [None, ["a"]],
    "share": ["x"],
    "foreign": [False, True],
}
NAMES = [
    "shard-0-of-0.rank-0-of-1.a.json",
    "shard-5-of-2.rank-0-of-1.a.json",
    "shard-0-of-1.rank-1-of-1.a.json",
    "shard-0-of-1.rank-0-of-0.a.json",
    f"shard-0-of-{'9' * 100}.rank-0-of-1.a.json",
    f"shard-0-of-1.rank-0-of-{'9' * 100}.a.json",
    "shard-٣-of-٤.rank-٠-of-١.a.json",
    "shard-0-of-1.rank-0-of-1..json",
    ".json",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock_module, "POLL", 0.02)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "s" / FOLDER
    place.mkdir(parents=True)
    return place


def passes(folder, limit=3.0):
    """A claim of the whole store is had at once, and everybody can look."""
    start = time.monotonic()
    mine = Heartbeat(folder.parent, WHOLE, every=0.05)
    claim(mine, 8)
    with mine:
        mine.begin(8)
        mine.block_done(7)
        LivenessMonitor(folder.parent, mine.run, [WHOLE]).look()
    assert time.monotonic() - start < limit
    said = [each for each in reports(folder.parent) if each.run == mine.run]
    assert [each.state for each in said] == ["finished"]
    mine.file.unlink()


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_not_seen(kind, folder):
    (folder / NAME).write_bytes(DAMAGED[kind])
    assert reports(folder.parent) == []
    passes(folder)


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_kind_or_size_is_not_believed(name, folder):
    for value in WRONG[name]:
        (folder / NAME).write_text(json.dumps({**SAID, name: value}))
        assert reports(folder.parent) == []
        passes(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_no_share_is_not_seen(name, folder):
    (folder / name).write_text(json.dumps(SAID))
    assert reports(folder.parent) == []
    passes(folder)


@pytest.mark.parametrize("name", [NAME, f"{WHOLE.name}.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "dangling link", "device"])
def test_what_is_no_file_is_neither_read_nor_written(kind, name, folder, tmp_path):
    other = tmp_path / "theirs"
    other.write_text(json.dumps(SAID))
    make = {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "link": lambda path: os.symlink(other, path),
        "dangling link": lambda path: os.symlink(tmp_path / "nowhere", path),
        "device": lambda path: os.symlink("/dev/zero", path),
    }[kind]
    make(folder / name)
    passes(folder)
    assert other.read_text() == json.dumps(SAID) and not (tmp_path / "nowhere").exists()


def test_of_very_many_files_some_are_looked_at(folder, monkeypatch):
    monkeypatch.setattr(liveness, "MOST_FILES", 50)
    for number in range(200):
        (folder / f"{WHOLE.name}.{number:04x}.json").write_text(
            json.dumps({**SAID, "state": "failed"})
        )
    assert len(reports(folder.parent)) == 50
    start = time.monotonic()
    claim(Heartbeat(folder.parent, WHOLE), 8)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("ahead", [3600.0, 1e9])
def test_a_file_from_the_future_holds_nothing(ahead, folder):
    (folder / NAME).write_text(json.dumps(SAID))
    os.utime(folder / NAME, (time.time() + ahead,) * 2)
    passes(folder)


def test_a_claim_that_stays_the_same_holds_nothing_in_the_end(folder, monkeypatch):
    monkeypatch.setattr(lock_module, "SILENT", 0.05)  # half a second, seen by one's own clock
    (folder / NAME).write_text(json.dumps(SAID))
    os.utime(folder / NAME, (time.time() + 60,) * 2)
    passes(folder, limit=5.0)


@pytest.mark.skipif(os.getuid() != 0, reason="gives a file to another user")
def test_a_claim_of_another_user_is_shown_and_holds_nothing(folder, tmp_path, capsys):
    alive = {
        **SAID,
        "pid": os.getpid(),
        "machine": machine_here(),
        "born": liveness.born(os.getpid()),
    }
    (folder / NAME).write_text(json.dumps(alive))
    assert reports(folder.parent)[0].at_work
    os.chown(folder / NAME, 12345, 12345)
    (report,) = reports(folder.parent)
    assert report.foreign and report.running and not report.at_work
    with pytest.warns(DminWarning, match="of another user"):
        passes(folder)
    assert (folder / NAME).exists()  # nor is it removed
    claims = tmp_path / ".model.claims" / FOLDER
    claims.mkdir(parents=True)
    (claims / NAME).write_text(json.dumps(alive))
    os.chown(claims / NAME, 12345, 12345)
    with pytest.warns(DminWarning), hold(tmp_path / "model", wait=0):
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="gives a folder to another user")
def test_a_lock_in_a_folder_of_another_user_is_not_taken(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    place = tmp_path / f"dmin-{os.getuid()}"
    place.mkdir()
    os.chown(place, 12345, 12345)
    passes(folder)
    assert list(place.iterdir()) == []


def test_status_shows_such_a_folder(tmp_path, capsys):
    store = made(tmp_path / "s", drawn(56), segment_bytes=1)
    for segment in store.segments[4:]:
        segment.path.unlink()
    folder = store.path / FOLDER
    folder.mkdir(exist_ok=True)
    for number, content in enumerate(DAMAGED.values()):
        (folder / f"{WHOLE.name}.{number}.json").write_bytes(content)
    odd = {"host": "\x1b[2J[/b]", "note": "[red]\x07", "rate": 1e-300, "done": 10**15}
    for number, state in enumerate(("collecting", "failed", "[/x]")):
        name = f"{Shard(number, 3).name}.odd.json"
        (folder / name).write_text(json.dumps({**SAID, **odd, "state": state}))
    for more in ([], ["json=true"]):
        assert main(["status", str(store.path), *more]) == 0
        shown = capsys.readouterr().out
        assert "\x1b" not in shown and "\x07" not in shown
