"""Run ``python ARGUMENTS`` in processes forked from one that has already imported what is slow.

Torch, Lightning and diffusers take seconds to import, and the tests give many commands. The one
process that imports them does nothing else, so no thread is lost at a fork. A test of how a process
starts, or of what a command imports, starts Python itself.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

_SLOW_TO_IMPORT = [
    *("lightning.pytorch", "diffusers.models.unets.unet_2d", "matplotlib.pyplot", "scipy.stats"),
    *("dmin.cli.commands", "dmin.collect", "dmin.gallery", "dmin.models.families.ddpm"),
]
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(_SLOW_TO_IMPORT)


class Command:
    """A running ``python ARGUMENTS``: ``pid``, ``poll`` and ``wait``, as of ``Popen``."""

    def __init__(self, *arguments, cwd=None):
        self.args = [str(each) for each in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self.files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        told = (self.args, str(cwd or Path.cwd()), dict(os.environ), self.files)
        self._process = _processes.Process(target=_work, args=told)
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """Return the status it ended with, None while it runs."""
        return self._process.exitcode

    def kill(self):
        self._process.kill()

    def wait(self, timeout=300):
        """Return what became of it; one that takes longer is killed."""
        self._process.join(timeout)
        if (status := self.poll()) is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        said = (file.read_text() for file in self.files)
        return subprocess.CompletedProcess(self.args, status, *said)


def dmin(*arguments, cwd, ok=True, fork=True):
    """Run ``dmin ARGUMENTS`` as in a shell in the folder ``cwd``; it must succeed, or fail."""
    if fork:
        run = Command("-m", "dmin", *arguments, cwd=cwd).wait()
    else:
        line = [sys.executable, "-m", "dmin", *map(str, arguments)]
        run = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert (run.returncode == 0) == ok, run.stdout[-3000:] + run.stderr[-3000:]
    return run


def _work(arguments, cwd, environ, files):
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    if arguments[0] == "-m":
        _, module, *sys.argv[1:] = arguments
        sys.path.insert(0, cwd)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
