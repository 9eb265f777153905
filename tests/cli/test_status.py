"""`dmin status`: what it tells of stores that are whole, at work, and dead."""

import json
import subprocess
import sys

import pytest
from attribution.made_stores import drawn, made

from dmin.cli import main
from dmin.workers.heartbeat import Heartbeat
from dmin.workers.lock import claim
from dmin.workers.shard import Shard


@pytest.fixture
def half(tmp_path):
    """A store of 8 blocks of 7 rows of which the first 4 are there, its place in two shards."""
    store = made(tmp_path / "s", drawn(56), segment_bytes=1)
    for segment in store.segments[4:]:
        segment.path.unlink()
    return store.path


def told(capsys, *arguments):
    assert main(["status", *map(str, arguments)]) == 0
    return " ".join(capsys.readouterr().out.split())


def change(path, share, **changes):
    (file,) = (path / "progress").glob(f"{share.name}.*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_it_tells_what_is_done_and_left_and_at_what_rate(half, capsys):
    for shard, rate in ((0, 7.0), (1, 3.5)):
        progress = Heartbeat(half, Shard(shard, 2))
        claim(progress, 8)
        progress.say(state="collecting", blocks=4, done=2, rows=14, rate=rate)
    text = told(capsys, half)
    assert "28 of 56 rows sealed (50.0 %), 4 of 8 blocks" in text
    assert "2 running, 10.50 rows/s together, 4 s left" in text  # 14 rows at 3.5 a second
    assert "shard 1 of 2" in text and "nobody" not in text
    values = json.loads(told(capsys, f"store={half}", "json=true"))
    assert values["rows"] == 28 and values["seconds_left"] == 4.0
    assert [each["share"] for each in values["processes"]] == ["shard 0 of 2", "shard 1 of 2"]


def test_it_tells_who_died_and_what_nobody_does(half, capsys):
    for shard in (0, 1):
        claim(Heartbeat(half, Shard(shard, 2)), 8)
    change(half, Shard(1, 2), pid=2**22 + 1, blocks=4, done=1)
    text = told(capsys, half)
    assert "1 died before finishing up to 3 blocks" in text
    assert "no process computes 4 missing blocks (numbers 4-7)" in text and "dead" in text


def test_it_tells_what_went_wrong_and_that_clocks_are_apart(half, capsys):
    with pytest.raises(ValueError), Heartbeat(half, Shard(0, 2)) as progress:
        claim(progress, 8)
        raise ValueError("a bad image")
    claim(Heartbeat(half, Shard(1, 2)), 8)
    change(half, Shard(1, 2), clock=0.0)
    text = told(capsys, half)
    assert "failed" in text and "a bad image" in text and "clocks differ" in text


def test_all_stores_are_listed(half, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 1
    assert "no stores in" in capsys.readouterr().err
    half.parent.joinpath("outputs").mkdir()
    (tmp_path / "outputs/stores").mkdir()
    half.rename(tmp_path / "outputs/stores/half")
    made(tmp_path / "outputs/stores/whole", drawn(7))
    text = told(capsys)
    assert "28/56 50.0 %" in text and "7/7 complete" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "There is no store at nowhere"), (["jsn=true"], "takes a store and json=true")],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert main(["status", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_it_does_without_torch(half):
    check = "import sys; from dmin.cli import main; main(sys.argv[1:]); assert 'torch' not in "
    line = [sys.executable, "-c", f"{check} sys.modules", "status", str(half)]
    subprocess.run(line, check=True, capture_output=True, timeout=60)
