"""Tasks, devices and processes: what fits together, and what is said of what does not."""

import signal
import subprocess

import pytest

from dmin.cli import slurm
from dmin.cli.processes import check_devices, is_main
from dmin.cli.slurm import Processes, Tasks, after_stop, check_fit, check_running, parsed_time
from dmin.errors import DminError
from dmin.stopping import Stopped

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
        (Processes(None, 2, "ddp"), STEP, r"devices=auto.*say the number of devices"),
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


def test_the_times_of_slurm_are_read():
    assert parsed_time("1-02:03:04") == 93784
    assert parsed_time("4:05") == 245
    assert parsed_time("UNLIMITED") is None and parsed_time("") is None


class TestAfterASignal:
    @pytest.fixture
    def asked(self, monkeypatch):
        calls = []

        def run(command, **_):
            calls.append(command)
            return subprocess.CompletedProcess(command, 0, "0:50", "")

        monkeypatch.setattr(slurm.subprocess, "run", run)
        monkeypatch.setattr(slurm.shutil, "which", lambda name: name)
        monkeypatch.setattr(slurm.time, "sleep", lambda seconds: calls.append("stays"))
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
        with pytest.raises(DminError, match=r"before one block.*50 s before its end.*more time"):
            after_stop(self.stopped(signal.SIGUSR1, gained=False), True, True, print)
        assert asked == [["squeue", "-h", "-j", "17", "-o", "%L"]]

    def test_outside_of_slurm_it_cannot_be(self, monkeypatch):
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        with pytest.raises(DminError, match=r"requeue=true, but this is no job of SLURM"):
            after_stop(self.stopped(signal.SIGUSR1), True, True, print)
