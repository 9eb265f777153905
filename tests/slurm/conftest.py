"""A SLURM cluster: that of the environment, or one made for the tests by a script given to them."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

# Names a script that brings up a cluster of its own: unpack DIR, start DIR NODES, stop DIR.
SCRIPT = "SLURM_CLUSTER"


class Cluster:
    """Runs commands where SLURM's own are found."""

    def __init__(self, environ: dict[str, str], folder: Path) -> None:
        self.environ, self.folder = environ, folder

    def run(self, *line, ok=True, timeout=240, **more):
        run = subprocess.run(
            [str(each) for each in line],
            env={**self.environ, **more},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert (run.returncode == 0) == ok, run.stdout[-3000:] + run.stderr[-3000:]
        return run

    def submit(self, script, *settings, options=()) -> str:
        """Submit a batch script and return the number of the job."""
        log = self.folder / "job-%j.log"
        line = ["sbatch", "--parsable", f"--output={log}", *options, script, *settings]
        return self.run(*line).stdout.strip()

    def state(self, job: str) -> str:
        """Return its state; empty once it is forgotten."""
        run = self.run("scontrol", "show", "job", "-o", job)
        return run.stdout.partition("JobState=")[2].split(" ")[0]

    def wait(self, job: str, states=("COMPLETED",), timeout=240) -> None:
        """Wait for a job to come to a state; fail if it ends in another."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        end = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            assert state not in ends and time.monotonic() < end, f"{state}: {self.log(job)}"
            time.sleep(0.3)

    def log(self, job: str) -> str:
        """Return what a job said."""
        file = self.folder / f"job-{job}.log"
        return file.read_text() if file.is_file() else ""


@pytest.fixture(scope="session")
def _environ():
    """The environment in which sbatch is found."""
    script = os.environ.get(SCRIPT)
    if script is None:
        if shutil.which("sbatch") is None:
            pytest.skip(f"no SLURM: neither sbatch nor {SCRIPT}=path/of/a/script")
        yield dict(os.environ)
        return
    with tempfile.TemporaryDirectory(prefix="dmin-slurm-") as folder:  # sockets want a short path
        packages = os.environ.get("SLURM_TEST_ROOT") or f"{folder}/packages"
        environ = {**os.environ, "SLURM_TEST_ROOT": packages}
        if not Path(packages).is_dir():
            subprocess.run([script, "unpack", packages], check=True, timeout=120)
        made = f"{folder}/cluster"
        subprocess.run([script, "start", made, "2"], check=True, env=environ, timeout=60)
        try:
            shown = f". {shlex.quote(made)}/env.sh && env -0"
            run = subprocess.run(
                ["bash", "-c", shown], env=environ, check=True, capture_output=True, text=True
            )
            yield dict(line.split("=", 1) for line in run.stdout.split("\0") if line)
        finally:
            subprocess.run([script, "stop", made], check=True, env=environ, timeout=60)


@pytest.fixture(scope="module")
def cluster(_environ, tmp_path_factory):
    """The cluster, in a folder of its own that all nodes see."""
    folder = tmp_path_factory.mktemp("shared")
    commands = folder / "bin"
    commands.mkdir()
    dmin = commands / "dmin"
    dmin.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m dmin "$@"\n')
    dmin.chmod(0o755)
    path = f"{commands}:{_environ['PATH']}"
    source = str(Path(__file__).parents[2])
    python = os.pathsep.join(filter(None, [source, _environ.get("PYTHONPATH")]))
    return Cluster({**_environ, "PATH": path, "PYTHONPATH": python, "COLUMNS": "200"}, folder)
