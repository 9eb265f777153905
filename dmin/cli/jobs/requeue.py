"""SLURM: requeue a job that is signalled to stop before its work is done."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping

from dmin.runtime.errors import DminError
from dmin.runtime.signals import Stopped

SECONDS = 20  # that a command of SLURM may take


def after_stop(stopped: Stopped, asked: bool, is_main: bool, tell: Callable[[str], None]) -> None:
    """Put the job back into the queue, if it is to go on there.

    Cancelled and preempted jobs (SIGTERM) do not: SLURM itself requeues what it preempts.

    Args:
        stopped: how the work ended.
        asked: ``collect.requeue``.
        is_main: whether this process does it; the others stay until SLURM ends them, as SLURM may
            treat the first that exits as a failure.
        tell: called with a message.

    Raises:
        DminError: it cannot be requeued, or would never make progress.
    """
    submitit = callable(stopped.before)
    if stopped.signum == signal.SIGTERM or not (submitit or asked):
        return
    if not stopped.gained:
        raise DminError(
            f"the job got {stopped.signum.name} before one block was finished. It is not requeued, "
            "as it would not get further next time. Request more time, send the signal later, or "
            "set collect.block_size lower (in a new store) and collect.workers higher."
        )
    if submitit:
        tell("finished blocks are sealed; submitit decides whether to requeue the job")
        stopped.before(stopped.signum, None)
    elif is_main:
        tell(f"finished blocks are sealed; job {requeue()} is requeued")
    time.sleep(SECONDS)


def requeue(environ: Mapping[str, str] = os.environ) -> str:
    """Requeue this process's job; SLURM then ends it.

    Returns:
        The number of the job.

    Raises:
        DminError: there is no such job, or SLURM refused.
    """
    job = environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("scontrol") is None:
        raise DminError(
            "collect.requeue=true, but this is not a SLURM job. Finished blocks are sealed: run "
            "the same command again."
        )
    try:
        run = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=SECONDS
        )
        said = run.stderr.strip() if run.returncode else ""
    except subprocess.TimeoutExpired:
        said = f"no answer in {SECONDS} s"
    if said:
        raise DminError(
            f"SLURM did not requeue job {job} ({said}). Submit it with --requeue if the cluster "
            f"does not requeue by default. Finished blocks are sealed: run the same command again."
        )
    return job
