"""On a real SLURM with two nodes: the store of one process, whatever happens to the jobs."""

import csv
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dmin.collect import GradientCollector
from dmin.data.digits import Digits
from dmin.data.image_folder import save_images
from dmin.data.subset import Subset
from dmin.diffusion.timesteps import Stratified
from dmin.sketches import BlockCyclic
from dmin.store import Store

pytestmark = pytest.mark.slurm

SCRIPTS = Path(__file__).parents[2] / "docs" / "slurm"
SETTINGS = [
    *("model=ddpm", "data=subset", "data@data.dataset=digits", "name=d"),
    *("sketch=block_cyclic", "sketch.dim=256", "timesteps.num=3"),
    *("collect.block_size=8", "collect.dtype=float32"),
    *("trainer.accelerator=cpu", "extras.threads=1", "extras.print_config=false"),
]
OPTIONS = ["--cpus-per-task=1", "--time=10"]
LONG = 400  # examples: enough to be in the middle when something happens


@pytest.fixture(scope="module")
def settings(ddpm_path):
    return [*SETTINGS, f"model.path={ddpm_path}"]


@pytest.fixture(scope="module")
def digest(ddpm, tmp_path_factory):
    """Of the store that one process makes of so many digits, by the same settings."""

    def of(count):
        data = Subset(Digits("train"), count=count)
        path = tmp_path_factory.mktemp("one") / "store"
        collector = GradientCollector(ddpm, BlockCyclic(256), Stratified(3))
        return collector.collect(data, path, block_size=8, dtype="float32").digest()

    return of


def begun(path, timeout=120):
    """Wait until some blocks are sealed."""
    end = time.monotonic() + timeout
    while len(list(path.glob("segment-*"))) < 4:
        assert time.monotonic() < end, "nothing was sealed"
        time.sleep(0.05)


def test_a_batch_job_is_signalled_requeued_cancelled_and_resumed(cluster, settings, digest):
    path = cluster.folder / "batch"
    more = [f"data.count={LONG}", f"collect.path={path}", "collect.segment_bytes=1"]
    script = SCRIPTS / "collect.sbatch"
    job = cluster.submit(script, *settings, *more, options=OPTIONS)
    begun(path)
    cluster.run("scancel", "--signal=USR1", job)  # what SLURM sends before the time is up
    cluster.wait(job, ["PENDING"])
    assert "are sealed; job" in cluster.log(job)
    there = len(Store(path))
    assert 0 < there < LONG and not list(path.glob("*.tmp"))
    status = cluster.run("dmin", "status", path).stdout
    assert status.count("stopped") == 2 and "tnode" in status
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    cluster.wait(job, ["RUNNING"])
    while len(Store(path, verify=False)) == there:
        time.sleep(0.1)
    cluster.run("scancel", job)
    cluster.wait(job, ["CANCELLED"])
    assert there < len(Store(path)) < LONG
    cluster.wait(cluster.submit(script, *settings, *more, options=OPTIONS))
    store = Store(path)
    assert store.complete and store.digest() == digest(LONG)


def test_an_array_of_shards_and_a_search_on_two_nodes(cluster, settings, digest):
    more = ["data.count=60", "shard.num=3"]
    job = cluster.submit(
        SCRIPTS / "shards.sbatch", *settings, *more, options=[*OPTIONS, "--array=0-2"]
    )
    end = time.monotonic() + 200
    while cluster.run("squeue", "-h", "-j", job).stdout:
        assert time.monotonic() < end
        time.sleep(0.3)
    (path,) = (cluster.folder / "outputs/stores").glob("d-train-*")
    store = Store(path)
    assert store.complete and store.digest() == digest(60)

    asked = cluster.folder / "asked"
    images = torch.stack([example.image for example in Digits("heldout").examples[:4]])
    save_images(asked, images, [f"{i}.png" for i in range(4)], [{"label": i} for i in range(4)])
    ask = ["dmin", "retrieve", *settings, "data.count=60", "retrieve.k=5"]
    ask += ["queries=images", f"queries.root={asked}", "queries.mode=L"]
    srun = ["srun", "-N2", "-n2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    said = cluster.run(*srun, *ask, "shard=slurm_task").stdout
    assert said.count("ranking.csv") == 1 and "The job that ranks the last" in said
    cluster.run(*ask)
    one, two = (list(csv.DictReader(file.open())) for file in rankings(cluster.folder))
    for key in ("query", "rank", "id", "row", "score"):  # what timesteps add agrees to rounding
        assert [row[key] for row in one] == [row[key] for row in two]
    assert len(one) == 20


def rankings(folder):
    return sorted((folder / "outputs/runs/retrieve").glob("*/ranking.csv"))


def test_submitit_runs_a_job_on_two_nodes_and_again_after_a_signal(cluster, settings, digest):
    line = ["dmin", "collect", "-m", *settings, f"data.count={LONG}", "collect.segment_bytes=1"]
    line += ["hydra/launcher=slurm", "hydra.launcher.timeout_min=10", "trainer=ddp"]
    line += ["hydra.launcher.cpus_per_task=1", "trainer.num_nodes=2", "trainer.devices=1"]
    path = cluster.folder / "submitit"
    sweep = subprocess.Popen(
        [*line, f"collect.path={path}"],
        env=cluster.environ,
        cwd=cluster.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        begun(path)
        (job,) = cluster.run("squeue", "-h", "-t", "R", "-o", "%A").stdout.split()
        cluster.run("scancel", "--signal=USR2", job)
        cluster.wait(job, ["PENDING"])
        assert 0 < len(Store(path)) < LONG
        cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        said = sweep.communicate(timeout=240)[0]
    finally:
        sweep.kill()
    assert sweep.returncode == 0, said
    assert Store(path).digest() == digest(LONG) and "finished" in said


def test_what_cannot_work_is_refused_at_once(cluster, settings):
    twice = ["srun", "-N2", "-n2", "--ntasks-per-node=1", "dmin", "collect", *settings]
    said = cluster.run(*twice, "data.count=9", ok=False, timeout=120).stderr
    assert "every task would do all of the work" in said and "shard=slurm_task" in said
    sweep = ["dmin", "collect", "-m", *settings, "hydra/launcher=slurm"]
    said = cluster.run(*sweep, "hydra.launcher.nodes=2", ok=False).stderr
    assert "every task would do all of the work" in said
    commands = cluster.folder / "bin"
    said = cluster.run(commands / "dmin", *sweep[1:], ok=False, PATH=str(commands)).stderr
    assert "this machine has no SLURM" in said
    assert not cluster.run("squeue", "-h").stdout


def test_a_node_without_the_shared_folder_is_told(cluster, settings):
    if cluster.run("id", "-u").stdout.strip() != "0":
        pytest.skip("takes root: a folder is hidden from one node")
    path = cluster.folder / "hidden"
    path.mkdir()
    hide = f'[ "$SLURM_PROCID" = 0 ] || mount -t tmpfs none {path}; exec "$@"'
    line = ["srun", "-N2", "-n2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    line += ["unshare", "-m", "bash", "-c", hide, "hide", "dmin", "collect", *settings]
    line += ["data.count=20", f"collect.path={path}/store", "trainer=ddp", "trainer.num_nodes=2"]
    said = cluster.run(*line, "trainer.devices=1", ok=False).stderr
    assert "does not see the store that rank 0 made" in said and "shared file system" in said
