"""The processes of a job: their ranks, starting them, and ending those that lost their parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from dmin.cli.config.groups import config_directory
from dmin.cli.config.line import ROOT, words
from dmin.cli.jobs.slurm import Processes, check_running, tasks_here
from dmin.runtime.errors import DminError

if TYPE_CHECKING:
    import lightning

PARENT = "DMIN_PARENT"  # of a process that was started for another: the other's number
_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
GRACE = 30.0  # seconds to seal what is finished, once a process is lost


def is_main(trainer: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process prints, records and writes the results of its job.

    Args:
        trainer: the section ``trainer``.
        environ: of the process.
    """
    if Processes.of(trainer).alone and PARENT not in environ and "LOCAL_RANK" not in environ:
        return True
    ranks = ["RANK"] if "RANK" in environ else ["NODE_RANK", "LOCAL_RANK"]
    if "LOCAL_RANK" not in environ and tasks_here(environ) is not None:
        ranks = ["SLURM_PROCID"]
    return all(environ.get(name, "0") == "0" for name in ranks)


def make_trainer(cfg: DictConfig, command: str) -> lightning.Trainer:
    """Return a trainer with dmin's handling of processes.

    Args:
        cfg: the configuration.
        command: name of the command, for the other processes.

    Raises:
        DminError: tasks and processes do not match, or a device is missing.
    """
    from hydra.errors import InstantiationException
    from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    # On a machine with SLURM, for a process that srun did not start: as it should be.
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")
    settings = cfg.trainer
    processes = Processes.of(settings)
    check_running(processes, cfg.shard.num if cfg.get("shard") else 1)
    check_devices(settings)
    more: dict[str, Any] = {"enable_progress_bar": False} if cfg.extras.get("quiet") else {}
    tasks = tasks_here()
    if tasks is not None and settings.get("plugins") is None:
        # Our own way with signals (dmin.runtime.signals), and no part for SLURM in a lone process.
        ours = tasks.total > 1 and not processes.alone
        more["plugins"] = SLURMEnvironment(auto_requeue=False) if ours else LightningEnvironment()
    try:
        trainer: lightning.Trainer = instantiate(settings, _convert_="all", **more)
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, MisconfigurationException | ValueError | RuntimeError):
            raise
        told = " ".join(str(cause).split()).rstrip(".")
        raise DminError(
            f"the trainer cannot be created on {socket.gethostname()} with {processes} "
            f"trainer.accelerator={settings.get('accelerator')}: {told}."
        ) from error
    launcher = trainer.strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        trainer.strategy._launcher = _launcher(launcher, command)
    return trainer


def check_devices(trainer: Mapping[str, Any]) -> None:
    """Check that this process has its GPU, before others wait for it.

    Raises:
        DminError: fewer GPUs are visible than the trainer needs.
    """
    if trainer.get("accelerator") not in ("gpu", "cuda"):
        return
    import torch

    there = torch.cuda.device_count()
    wanted = Processes.of(trainer).per_node or 1
    if there < wanted:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        raise DminError(
            f"trainer.accelerator={trainer.get('accelerator')} trainer.devices={wanted}, but this "
            f"process sees {there} GPUs on {socket.gethostname()}{shown}. Request them (SLURM: "
            f"--gpus-per-node={wanted}; all tasks of a node must see all of them), lower "
            "trainer.devices, or set trainer=cpu."
        )


def follow_parent() -> None:
    """End this process when the one that started it dies; does nothing in other processes."""
    parent = os.environ.get(PARENT)
    if parent is None or os.getppid() != int(parent):
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, name="dmin-follow-parent", daemon=True).start()


def command_line(command: str) -> list[str]:
    """Return the command line for another process of the current job, without its sweep."""
    hydra = HydraConfig.get()
    line = [sys.executable, "-m", "dmin", command]
    of_words = hydra.job.config_name == ROOT
    line += words() if of_words else ["--config-name", str(hydra.job.config_name)]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            line += ["--config-dir", source.path]
        elif source.provider == "main" and source.path != str(config_directory()):
            line += ["--config-path", source.path]  # of a run that is repeated
    # The launcher and the sweeper had their part; where the job runs is said below.
    groups = ("hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweeper")
    had = (*groups, "hydra.run.", "hydra.mode", "hydra.job.name")
    line += [each for each in hydra.overrides.hydra if not each.lstrip("+~").startswith(had)]
    folder = hydra.runtime.output_dir.replace('"', r"\"")
    return [*line, *hydra.overrides.task, f'hydra.run.dir="{folder}"', "hydra.output_subdir=null"]


def _launcher(theirs: Any, command: str) -> Any:
    """Return Lightning's launcher of processes with the changes that a command of dmin needs."""
    from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    class JobLauncher(_SubprocessScriptLauncher):
        """Starts the ranks of one job, also within a sweep, and ends gracefully with them."""

        ranks_are_apart = False  # none waits for another any more: see dmin.collect.session

        def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
            environment = self.cluster_environment
            environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
            _set_num_threads_if_needed(num_processes=self.num_processes)
            if environment.creates_processes_externally:
                return function(*args, **kwargs)
            before = {name: os.environ.get(name) for name in _RENDEZVOUS}
            try:
                self.start()
                threading.Thread(target=_watch, args=(self.procs, trainer), daemon=True).start()
                return function(*args, **kwargs)
            finally:  # the next job of a sweep starts processes of its own
                _restore(before)

        def start(self) -> None:
            self._check_can_spawn_children()
            environment = self.cluster_environment
            shared = {
                "MASTER_ADDR": environment.main_address,
                "MASTER_PORT": str(environment.main_port),
                "NODE_RANK": str(environment.node_rank()),
                "WORLD_SIZE": str(self.num_processes * self.num_nodes),
            }
            os.environ.update(shared, LOCAL_RANK=str(environment.local_rank()))
            for rank in range(1, self.num_processes):
                own = {**os.environ, "LOCAL_RANK": str(rank), PARENT: str(os.getpid())}
                self.procs.append(subprocess.Popen(command_line(command), env=own))

    return JobLauncher(theirs.cluster_environment, theirs.num_processes, theirs.num_nodes)


def _restore(environ: Mapping[str, str | None]) -> None:
    """Leave a process group, and restore the environment."""
    import torch.distributed as distributed

    for name, value in environ.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    # Without the others, NCCL may wait for them here.
    if not distributed.is_initialized():
        return
    if sys.exc_info()[0] is None or "nccl" not in distributed.get_backend():
        distributed.destroy_process_group()


def _watch(started: Sequence[subprocess.Popen[bytes]], trainer: lightning.Trainer) -> None:
    """Report when a process dies; end this one, unless it can finish its own part."""
    while True:
        codes = [process.poll() for process in started]
        if all(code == 0 for code in codes):
            return
        dead = [rank for rank, code in enumerate(codes, 1) if code]
        if dead:
            break
        time.sleep(0.5)
    rank, process = dead[0], started[dead[0] - 1]
    print(
        f"dmin: the process of rank {rank} ({process.pid}) ended with {process.returncode}. Sealed "
        "blocks are kept.",
        file=sys.stderr,
        flush=True,
    )
    if trainer.strategy.launcher.ranks_are_apart:  # type: ignore[union-attr]
        return  # at the end it is told what is missing
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    for each in started:
        each.kill()
    os._exit(1)
