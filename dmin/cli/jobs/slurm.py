"""SLURM: check that tasks, devices and nodes are consistent, before submission and at the start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dmin.runtime.errors import DminError

# What Lightning too takes for a shell inside of an allocation, where srun has no part.
_SHELLS = ("bash", "interactive")


class Processes(NamedTuple):
    """The processes that a trainer's settings request.

    Args:
        per_node: one for each device; None if `auto` leaves it to the machine.
        nodes: machines.
        strategy: the configured strategy.
    """

    per_node: int | None
    nodes: int
    strategy: str

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> Processes:
        """Read them from the section ``trainer``."""
        devices = trainer.get("devices", 1)
        strategy = trainer.get("strategy", "auto")
        if isinstance(devices, str) and devices.lstrip("-").isdecimal():
            devices = int(devices)
        if isinstance(devices, str) and "," in devices:
            devices = [each for each in devices.split(",") if each]
        per_node = None if devices in ("auto", -1) else devices
        if not isinstance(devices, int | str):
            per_node = len(devices)
        name = strategy if isinstance(strategy, str) else strategy.get("_target_", "given")
        return cls(per_node, trainer.get("num_nodes") or 1, str(name).rpartition(".")[2])

    @property
    def alone(self) -> bool:
        """Whether there is only one process."""
        return self.nodes == 1 and self.per_node in (1, None)

    def __str__(self) -> str:
        """Return the settings they come from."""
        devices = "auto" if self.per_node is None else self.per_node
        return f"trainer.devices={devices} trainer.num_nodes={self.nodes}"


class Tasks(NamedTuple):
    """Tasks per node and nodes that SLURM starts, or is requested to start."""

    per_node: int
    nodes: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.per_node * self.nodes


def tasks_here(environ: Mapping[str, str] = os.environ) -> Tasks | None:
    """Return the tasks of this process's SLURM job; None outside of SLURM."""
    if "SLURM_NTASKS" not in environ or environ.get("SLURM_JOB_NAME") in _SHELLS:
        return None
    nodes = int(environ.get("SLURM_NNODES", 1))
    return Tasks(-(-int(environ["SLURM_NTASKS"]) // nodes), nodes)


def check_running(
    processes: Processes, shards: int, environ: Mapping[str, str] = os.environ
) -> None:
    """Refuse a SLURM job that would hang, or do the same work in every task.

    Args:
        processes: requested by the trainer's settings.
        shards: ``shard.num``.
        environ: of the process.

    Raises:
        DminError: with the mismatch and two ways to fix it.
    """
    tasks = tasks_here(environ)
    if tasks is None or tasks.total == 1:
        if processes.nodes > 1 and tasks is not None:
            raise DminError(_mismatch(processes, tasks))
        return
    if "SLURM_STEP_ID" not in environ:
        raise DminError(
            f"this job has {tasks.total} tasks, but dmin was started once, by the batch script. "
            f"Start it with srun, as in `exec srun --kill-on-bad-exit=1 dmin …`."
        )
    check_fit(processes, tasks, shards)
    if not processes.alone and "SLURM_NTASKS_PER_NODE" not in environ:
        raise DminError(
            f"the job was given --ntasks={tasks.total} without --ntasks-per-node, which sets the "
            f"processes of a node. Use --nodes={processes.nodes} "
            f"--ntasks-per-node={processes.per_node} instead."
        )


def check_fit(processes: Processes, tasks: Tasks, shards: int) -> None:
    """Check that tasks and the trainer's processes match one to one.

    Raises:
        DminError: they are not.
    """
    if processes.alone and tasks.total > 1:
        if shards >= tasks.total:
            return  # each task a shard of its own
        raise DminError(
            f"{tasks.total} tasks on {tasks.nodes} nodes, but trainer.strategy="
            f"{processes.strategy} with {processes}: every task would do all of the work. Set "
            f"trainer=ddp trainer.devices={tasks.per_node} trainer.num_nodes={tasks.nodes}, or "
            f"give each task a shard: shard=slurm_task."
        )
    if processes.per_node is None and not processes.alone:
        raise DminError(f"{processes}: set trainer.devices to the number of tasks of a node.")
    if (processes.per_node or 1, processes.nodes) != tuple(tasks):
        raise DminError(_mismatch(processes, tasks))


def check_submission(config: DictConfig) -> None:
    """Check the jobs of a SLURM sweep before any is submitted.

    Args:
        config: of the sweep, with Hydra's own node.

    Raises:
        DminError: there is no SLURM here, or the settings of a job do not match.
    """
    launcher = config.hydra.launcher
    if not launcher._target_.endswith(".SlurmLauncher"):
        return
    if shutil.which("sbatch") is None:
        raise DminError(
            "hydra/launcher=slurm, but this machine has no SLURM (there is no sbatch on its PATH). "
            "Run the command where jobs are submitted, or set hydra/launcher=local to run "
            "the jobs here."
        )
    asked = f"hydra.launcher.timeout_min={launcher.timeout_min}"
    if 60 * launcher.timeout_min < launcher.signal_delay_s + 60:
        raise DminError(
            f"{asked} with hydra.launcher.signal_delay_s={launcher.signal_delay_s}: the job would "
            f"be signalled to stop as soon as it starts. Request more time, or a later signal."
        )
    for cfg in _jobs(config):
        processes = Processes.of(cfg.trainer)
        tasks = OmegaConf.select(cfg, "hydra.launcher.tasks_per_node") or 1
        if not isinstance(tasks, int):
            raise DminError(
                f"hydra.launcher.tasks_per_node={tasks}: SLURM needs a number. Set the "
                f"devices of a node: trainer.devices=8."
            )
        check_fit(processes, Tasks(tasks, launcher.nodes), cfg.shard.num)
        check_gpus(cfg.trainer, launcher, tasks)


def check_gpus(trainer: Mapping[str, Any], launcher: Mapping[str, Any], tasks: int) -> None:
    """Check that a GPU job requests enough GPUs from SLURM.

    Raises:
        DminError: it requests fewer, or none.
    """
    if trainer.get("accelerator") not in ("gpu", "cuda"):
        return
    more = launcher.get("additional_parameters") or {}
    if any(str(key).replace("_", "-") in ("gres", "gpus", "gpus-per-task") for key in more):
        return  # said in a way of the user's own
    gpus = launcher.get("gpus_per_node") or (launcher.get("gpus_per_task") or 0) * tasks
    if gpus < tasks and not launcher.get("gres"):
        raise DminError(
            f"trainer.accelerator={trainer['accelerator']} with {tasks} tasks on a node, but "
            f"the job requests {gpus} GPUs on each. Set hydra.launcher.gpus_per_node={tasks}."
        )


def _jobs(config: DictConfig) -> list[DictConfig]:
    """Return the configurations of a sweep's jobs with distinct process settings."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(loader).parse_overrides(list(config.hydra.overrides.task))
    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    apart = {
        tuple(each for each in job if each.lstrip("+").startswith(("trainer", "shard.num"))): job
        for job in jobs
    }
    return [loader.load_sweep_config(config, job) for job in apart.values()]


def _mismatch(processes: Processes, tasks: Tasks) -> str:
    return (
        f"SLURM starts {tasks.per_node} tasks on each of {tasks.nodes} nodes, but {processes}. "
        f"Each task uses one device: set trainer.devices={tasks.per_node} "
        f"trainer.num_nodes={tasks.nodes}, or request --nodes={processes.nodes} "
        f"--ntasks-per-node={processes.per_node}."
    )
