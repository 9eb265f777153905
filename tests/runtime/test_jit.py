"""Compiled loops: kept on disk where there is a place for them, and announced before a wait."""

import importlib.util
import types

import numba
import pytest

from dmin.runtime import jit

LOOP = """
from dmin.runtime.jit import compiled

@compiled
def add(a, b):
    return a + b

@compiled
def negative(a):
    return -a
"""


@pytest.fixture(autouse=True)
def _afresh(monkeypatch, tmp_path):
    """A process that has said nothing yet, with nothing kept."""
    monkeypatch.setattr(jit, "_notice", notice := type(jit._notice)())
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    jit.register("numba:compile", notice)
    yield
    numba.core.event.unregister("numba:compile", notice)


def test_a_wait_is_announced_once_and_what_was_compiled_is_kept(tmp_path, capfd):
    file = tmp_path / "loops.py"
    file.write_text(LOOP)

    def loaded():
        spec = importlib.util.spec_from_file_location("loops", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    loops = loaded()
    assert loops.add(1, 2) == 3 and loops.negative(1) == -1
    said = capfd.readouterr()
    assert said.err == "dmin: compiling loops for this processor (once, up to a minute)\n"
    assert not said.out
    again = loaded()
    jit._notice.said = False
    assert again.add(1, 2) == 3 and again.add.stats.cache_hits
    assert not capfd.readouterr().err


def test_without_a_place_to_keep_them_loops_work_and_the_remedy_is_named(capfd):
    loops = types.ModuleType("loops")
    exec(LOOP, loops.__dict__)  # code without a file: numba finds no place for it
    assert loops.add(1, 2) == 3
    assert "in every run: set NUMBA_CACHE_DIR" in capfd.readouterr().err


def test_the_loops_of_others_are_theirs(capfd):
    assert numba.njit(lambda a: a + 1)(1) == 2
    assert not capfd.readouterr().err
