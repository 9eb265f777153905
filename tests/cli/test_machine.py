"""What the machine refuses is one paragraph, a defect of dmin keeps its traceback."""

import errno
import os
import re
import subprocess
import sys

import pytest

import dmin.store
from dmin.cli.main import main
from dmin.runtime.files import commit

FULL = OSError(errno.ENOSPC, "No space left on device", "/there/x")
TORCH = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    "error, message",
    [
        (FULL, r"Could not use /there/x \(No space left.*disk is full: free space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk quota is used up"),
        (OSError(errno.EROFS, "Read-only", "/there"), "read-only: choose another directory"),
        (OSError(errno.EIO, "Input/output error", "/there"), "the network to it failed"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/gone/x"), "was just removed"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "folder that this command was started"),
        (MemoryError(), r"not enough memory \(an allocation failed\).*collect\.microbatch"),
        (RuntimeError(TORCH), "not enough memory .*you tried"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/there"), "choose a shorter one"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "/there"),
            "folder of this name already",
        ),
    ],
)
def test_what_the_machine_refuses_is_a_paragraph(monkeypatch, error, message):
    def refused(*_):
        raise error

    monkeypatch.setattr(dmin.store, "Store", refused)
    with pytest.raises(SystemExit, match=message) as caught:
        main(["store", "info", "somewhere"])
    assert "\n" not in str(caught.value) and str(caught.value).startswith("dmin: ")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(type(error)):
        main(["store", "info", "somewhere"])


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), RuntimeError("x"), FileNotFoundError(2, "No such file", __file__ + ".no")],
)
def test_a_defect_keeps_its_traceback(monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(dmin.store, "Store", broken)
    with pytest.raises(type(error)):
        main(["store", "info", "somewhere"])


def test_a_folder_that_is_gone(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    start = f"import os, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r});"
    start += "from dmin.cli import main; sys.exit(main(['collect', 'some/store', 'model=mlp']))"
    found = subprocess.run(
        [sys.executable, "-c", start],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert found.returncode == 1 and "Traceback" not in found.stderr, found.stderr
    assert "no longer exists: change to another" in found.stderr


@pytest.mark.parametrize("at", ["hydra", "record", "command"])
def test_a_full_disk_is_one_paragraph_wherever_it_strikes(at, tmp_path, monkeypatch, capsys):
    full = OSError(errno.ENOSPC, "No space left on device")

    def refused(*_, **__):
        raise full

    monkeypatch.chdir(tmp_path)
    where, named = {
        "hydra": ("hydra.core.utils._save_config", "the run folder .* Set paths.outputs"),
        "record": ("dmin.cli.jobs.record.write", "the run folder .* Set paths.outputs"),
        "command": ("dmin.data.digits.Digits.__init__", "record or log .* disk is full: free"),
    }[at]
    monkeypatch.setattr(where, refused)
    with pytest.raises(SystemExit) as end:
        main(["train", "model=mlp", "train=digits_mlp", "data=digits", "model.path=m"])
    assert re.search(named, end.value.code) and "\n" not in end.value.code.strip()
    assert "Error executing job" not in capsys.readouterr().err


def test_a_model_that_cannot_be_saved_is_refused_before_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        SystemExit, match=r"Could not save a model at file/m \(Not a directory\): a"
    ):
        main(["train", "model=mlp", "train=digits_mlp", "data=digits", "model.path=file/m"])


def test_what_only_writes_is_named_in_its_error(tmp_path, monkeypatch):
    def refused(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(OSError, match=r"No space.*'.*/a\.json'"):
        commit(tmp_path / "a.json", b"x")
    assert not list(tmp_path.iterdir())
