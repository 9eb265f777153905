"""Tasks, devices and processes: what fits together, and what is said of what does not."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from dmin.cli.config.groups import config_directory
from dmin.cli.jobs import requeue, slurm
from dmin.cli.jobs.processes import check_devices, is_main
from dmin.cli.jobs.requeue import after_stop
from dmin.cli.jobs.slurm import (
    Processes,
    Tasks,
    check_fit,
    check_running,
    check_submission,
)
from dmin.runtime.errors import DminError
from dmin.runtime.signals import Stopped

STEP = {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "x"}


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({}, (1, 1, "auto")),
        ({"devices": "2", "num_nodes": 3}, (2, 3, "auto")),
        ({"devices": [0, 3], "strategy": "ddp"}, (2, 1, "ddp")),
        ({"devices": "0,3"}, (2, 1, "auto")),
        ({"devices": "auto", "strategy": {"_target_": "a.DDPStrategy"}}, (None, 1, "DDPStrategy")),
    ],
)
def test_processes_are_counted_as_lightning_counts_them(trainer, expected):
    assert Processes.of(trainer) == expected


def test_what_fits_is_let_through():
    check_fit(Processes(2, 3, "ddp"), Tasks(2, 3), shards=1)
    check_fit(Processes(1, 1, "auto"), Tasks(1, 4), shards=4)
    check_running(Processes(1, 1, "auto"), 1, environ={})
    check_running(Processes(4, 1, "ddp"), 1, environ={"SLURM_NTASKS": "1"})  # starts them itself
    check_running(Processes(1, 2, "ddp"), 1, environ={**STEP, "SLURM_NTASKS_PER_NODE": "1"})
    shell = {**STEP, "SLURM_JOB_NAME": "interactive"}
    check_running(Processes(1, 1, "auto"), 1, environ=shell)


@pytest.mark.parametrize(
    ("processes", "environ", "message"),
    [
        (
            Processes(1, 1, "auto"),
            STEP,
            r"2 tasks on 2 nodes, but trainer\.strategy=auto .*every task would do all.*"
            r"trainer=ddp trainer\.devices=1 trainer\.num_nodes=2",
        ),
        (Processes(2, 1, "ddp"), STEP, r"1 tasks on each of 2 nodes, but trainer\.devices=2 tr"),
        (Processes(1, 2, "ddp"), STEP, r"without --ntasks-per-node"),
        (Processes(None, 2, "ddp"), STEP, r"devices=auto.*set trainer.devices to the number"),
        (Processes(1, 2, "ddp"), {**STEP, "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}, r"of 1 nodes"),
        (
            Processes(1, 2, "ddp"),
            {k: v for k, v in STEP.items() if k != "SLURM_STEP_ID"},
            r"Start it with srun",
        ),
    ],
)
def test_what_would_wait_for_ever_or_do_the_same_twice_is_refused(processes, environ, message):
    with pytest.raises(DminError, match=message):
        check_running(processes, 1, environ)


@pytest.mark.parametrize(
    ("trainer", "environ", "main"),
    [
        ({}, {}, True),
        ({}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, True),  # a shard of its own
        ({"devices": 2}, {"LOCAL_RANK": "1"}, False),
        ({"devices": 2}, {"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"num_nodes": 2}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, False),
        ({"num_nodes": 2}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, True),
        ({"devices": 2}, {"RANK": "3", "LOCAL_RANK": "0"}, False),  # torchrun
    ],
)
def test_one_process_of_a_job_speaks_for_it(trainer, environ, main):
    assert is_main(trainer, environ) is main


def test_a_process_without_its_device_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    check_devices({"accelerator": "gpu", "devices": 1})
    check_devices({"accelerator": "cpu", "devices": 8})
    with pytest.raises(DminError, match=r"devices=2, but .* 1 GPUs .*CUDA_VISIBLE_DEVICES='3'"):
        check_devices({"accelerator": "gpu", "devices": 2})


class TestBeforeSubmission:
    def swept(self, *overrides, over=()):
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            line = ["model=ddpm", "data=digits", "hydra/launcher=slurm", *overrides]
            cfg = compose("dmin", line, return_hydra_config=True)
            with open_dict(cfg):
                cfg.hydra.overrides.task = [o for o in line if not o.startswith("hydra")] + [*over]
            check_submission(cfg)

    @pytest.fixture(autouse=True)
    def slurm_there(self, monkeypatch):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
        monkeypatch.setattr(slurm.shutil, "which", lambda name: name)

    def test_nodes_and_tasks_follow_the_trainer(self):
        self.swept()
        self.swept("trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2")
        self.swept("trainer=gpu", "hydra.launcher.gpus_per_node=1")

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["hydra.launcher.nodes=2"], "every task would do all"),
            (["trainer=gpu"], r"requests 0 GPUs.*gpus_per_node=1"),
            (["hydra.launcher.timeout_min=2"], "signalled to stop as soon as it starts"),
            (["trainer=ddp", "trainer.devices=auto"], r"tasks_per_node=auto.*devices=8"),
        ],
    )
    def test_a_job_that_could_not_run_is_refused(self, overrides, message):
        with pytest.raises(DminError, match=message):
            self.swept(*overrides)

    def test_every_job_of_a_sweep_is_looked_at(self):
        cfg = ["trainer=ddp", "trainer.devices=1", "hydra.launcher.tasks_per_node=1"]
        self.swept(*cfg)
        with pytest.raises(DminError, match=r"SLURM starts 1 tasks .* but trainer\.devices=2"):
            self.swept(*cfg, over=["trainer.devices=1,2"])

    def test_a_machine_without_slurm_is_told(self, monkeypatch):
        monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
        with pytest.raises(DminError, match=r"no SLURM.*hydra/launcher=local"):
            self.swept()


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(
        "import os, time\nfrom dmin.cli.jobs.processes import follow_parent\nfollow_parent()\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        "own = {**os.environ, 'DMIN_PARENT': str(os.getpid())}\n"
        f"subprocess.Popen([sys.executable, {str(child)!r}], env=own).wait()\n"
    )
    started = subprocess.Popen([sys.executable, "-c", parent])
    end = time.monotonic() + 60
    while not (pid := (tmp_path / "pid").read_text() if (tmp_path / "pid").exists() else ""):
        assert time.monotonic() < end
        time.sleep(0.05)
    started.kill()
    started.wait()
    while Path(f"/proc/{pid}").exists() and "Z" not in state(pid):
        assert time.monotonic() < end, "it lives on"
        time.sleep(0.05)


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


class TestAfterASignal:
    @pytest.fixture
    def asked(self, monkeypatch):
        calls = []

        def run(command, **_):
            calls.append(command)
            return subprocess.CompletedProcess(command, 0, "0:50", "")

        monkeypatch.setattr(requeue.subprocess, "run", run)
        monkeypatch.setattr(requeue.shutil, "which", lambda name: name)
        monkeypatch.setattr(requeue.time, "sleep", lambda seconds: calls.append("stays"))
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        return calls

    def stopped(self, signum, gained=True, before=signal.SIG_DFL):
        error = Stopped(signum, before)
        error.gained = gained
        return error

    def test_the_job_is_requeued_once(self, asked):
        after_stop(self.stopped(signal.SIGUSR1), True, True, print)
        after_stop(self.stopped(signal.SIGUSR1), True, False, print)
        assert asked == [["scontrol", "requeue", "17"], "stays", "stays"]

    def test_nothing_is_requeued_unasked_or_after_a_cancellation(self, asked):
        after_stop(self.stopped(signal.SIGUSR1), False, True, print)
        after_stop(self.stopped(signal.SIGTERM), True, True, print)
        assert asked == []

    def test_submitit_requeues_by_its_own_handler(self, asked):
        heard = []
        before = lambda signum, frame: heard.append(signum)  # noqa: E731
        after_stop(self.stopped(signal.SIGUSR2, before=before), False, True, print)
        assert heard == [signal.SIGUSR2] and asked == ["stays"]

    def test_a_walltime_shorter_than_a_block_is_not_tried_again(self, asked):
        with pytest.raises(DminError, match=r"before one block.*more time"):
            after_stop(self.stopped(signal.SIGUSR1, gained=False), True, True, print)
        assert asked == []

    def test_outside_of_slurm_it_cannot_be(self, monkeypatch):
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        with pytest.raises(DminError, match=r"requeue=true, but this is not a SLURM job"):
            after_stop(self.stopped(signal.SIGUSR1), True, True, print)
