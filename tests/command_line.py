"""Run ``python ARGUMENTS`` in processes forked from one that has already imported what is slow.

Torch, Lightning and diffusers take seconds to import, and the tests give many commands. The one
process that imports them does nothing else, so no thread is lost at a fork. A test of how a process
starts, or of what a command imports, starts Python itself.
"""

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

_SLOW_TO_IMPORT = [
    *("lightning.pytorch", "diffusers.models.unets.unet_2d", "matplotlib.pyplot", "scipy.stats"),
    *("sklearn.datasets", "hydra.core.plugins", "dmin.sketches.backends.cpu_kernels"),
    *("dmin.cli.config.compose", "dmin.cli.commands.demo", "dmin.cli.tools.repeat"),
    *("dmin.collect.append", "dmin.gallery", "dmin.models.families.ddpm"),
]
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(_SLOW_TO_IMPORT)


class Command:
    """A running ``python ARGUMENTS``: ``pid``, ``poll`` and ``wait``, as of ``Popen``.

    Its ranks are forked as well, unless ``fork_ranks`` is false. Such a rank is no child of the
    process that started it, and does not end with it.
    """

    def __init__(self, *arguments, cwd=None, env=None, files=None, fork_ranks=True):
        self.args = [str(each) for each in arguments]
        if files is None:
            self._folder = tempfile.TemporaryDirectory()
            files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        self.files = files
        told = (self.args, str(cwd or Path.cwd()), dict(env or os.environ), files, fork_ranks)
        self._process = _processes.Process(target=_work, args=told)
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """Return the status it ended with, None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self):
        return self.poll()

    def kill(self):
        self._process.kill()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

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


def _work(arguments, cwd, environ, files, fork_ranks):
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    # Python 3.11 would start a second server of forks from here, and this one is meant to serve.
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running
    if fork_ranks:
        subprocess.Popen = functools.partial(_started, subprocess.Popen, files)
    if arguments[0] == "-m":
        _, module, *sys.argv[1:] = arguments
        sys.path.insert(0, cwd)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _started(popen, files, line, *others, env=None, **options):
    """Start a process as Popen does; a rank of this job from the process that forks."""
    if env is None or "LOCAL_RANK" not in env or line[0] != sys.executable:
        return popen(line, *others, env=env, **options)
    return Command(*line[1:], cwd=options.get("cwd"), env=env, files=files)
