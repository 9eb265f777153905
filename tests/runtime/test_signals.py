"""Signals: noted, obeyed between two blocks, given back."""

import os
import signal
import subprocess
import sys

import pytest

from dmin.runtime import signals as stopping
from dmin.runtime.signals import Stopped, StopSignals


def test_the_first_signal_ends_between_blocks_a_second_between_passes(monkeypatch):
    monkeypatch.setattr(stopping, "SECONDS_OF_ONE_REQUEST", 0.0)
    before = signal.getsignal(signal.SIGUSR1)
    heard = []
    with StopSignals() as stop:
        stop.listen(heard.append)
        stop.between_blocks()
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.between_passes()
        with pytest.raises(Stopped) as first:
            stop.between_blocks()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            stop.between_passes()
    assert heard == [signal.SIGUSR1, signal.SIGTERM]
    assert first.value.code == 128 + signal.SIGUSR1 and first.value.before == before
    assert signal.getsignal(signal.SIGUSR1) == before


def test_one_request_that_comes_by_two_ways_is_one():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == [signal.SIGTERM]


def test_what_was_entered_before_stays_until_its_own_end():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        with stop:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as error:
            stop.between_blocks()
    assert error.value.before == before == signal.getsignal(signal.SIGTERM)


def test_a_terminal_that_closes_ends_the_work_but_not_under_nohup():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Stopped, match="SIGHUP"):
            stop.between_blocks()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.between_blocks()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


WINDOWS = """
import os, signal, sys
import numpy, h5py, filelock, rich.console
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd")))
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2"):
    delattr(signal, name)
del os.getuid
from pathlib import Path
from dmin.runtime.signals import SIGNALS
from dmin.runtime.provenance import circumstances, peak_memory
from dmin.store import Store
from dmin.workers.lock import hold
assert SIGNALS == (signal.SIGTERM,) and circumstances() and peak_memory() == {"process": 0}
with hold(Path(sys.argv[1]) / "store", wait=0):
    print("held")
"""


def test_nothing_asks_for_what_windows_has_not(tmp_path):
    run = [sys.executable, "-c", WINDOWS, str(tmp_path)]
    found = subprocess.run(run, capture_output=True, text=True)
    assert found.stdout == "held\n", found.stderr
