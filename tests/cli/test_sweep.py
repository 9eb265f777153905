"""Sweeps: every job runs, and one table tells what became of it."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from cli.test_commands import refusal
from command_line import dmin
from hydra.core.hydra_config import HydraConfig

from dmin.cli import main
from dmin.cli.jobs.record import recorded

COMMON = ["experiment=digits", "debug=fast", "data.split=heldout", "extras.threads=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model."""
    place = tmp_path_factory.mktemp("sweeps")
    network = "train.model.network.block_out_channels=[16,16]"
    dmin("train", *COMMON, network, "logger=csv", cwd=place)
    return place


def table(place, command):
    (file,) = place.glob(f"outputs/sweeps/{command}/*/sweep.csv")
    rows = list(csv.DictReader(file.open()))
    for path in (place / "outputs/sweeps" / command).iterdir():
        path.rename(place / f"{command}-{len(list(place.glob('*')))}")
    return rows


@pytest.mark.slow
def test_a_failed_job_does_not_lose_the_others(place):
    # 128 is refused by the sketch, five is refused by the validation, before anything runs
    swept = "sketch.dim=128,256,five"
    run = dmin("collect", "-m", *COMMON, swept, "data.split=heldout", cwd=place, ok=False)
    rows = table(place, "collect")
    assert [row["outcome"] for row in rows] == ["failed", "finished", "failed"]
    assert [row["sketch.dim"] for row in rows] == ["128", "256", "five"]
    assert "sketch.block" in rows[0]["why"] and "takes int" in rows[2]["why"]
    assert rows[1]["rows"] == "64" and (place / "outputs/stores" / rows[1]["store"]).is_dir()
    assert "2 of 3 jobs failed (number 0, 2" in run.stderr and "Traceback" not in run.stderr
    assert "sweep of 3 jobs" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["parallel", "local"])
def test_jobs_side_by_side_make_a_store_once(place, launcher):
    pytest.importorskip({"parallel": "joblib", "local": "submitit"}[launcher])
    seed = {"parallel": 5, "local": 6}[launcher]
    swept = [f"hydra/launcher={launcher}", f"noise.seed={seed}", "tags=[a],[b]"]
    # joblib's processes are never done in one that was forked
    dmin("collect", "-m", *COMMON, *swept, cwd=place, fork=launcher != "parallel")
    rows = table(place, "collect")
    assert [row["outcome"] for row in rows] == ["finished"] * 2
    assert rows[0]["store"] == rows[1]["store"]
    store = place / "outputs/stores" / rows[0]["store"]
    assert len(list(store.glob("segment-*"))) == 1  # two would be there had both collected


@pytest.mark.slow
def test_evaluate_sweeps_methods(place):
    dmin("collect", *COMMON, cwd=place)
    tasks = "benchmark.tasks.noisy_copies.queries.count=5"
    few = ["~benchmark.tasks.generated_digits", "~benchmark.tasks.heldout_digits", tasks]
    dmin("evaluate", "-m", *COMMON, *few, "method=dmin,das", cwd=place, ok=False)
    (results,) = place.glob("outputs/sweeps/evaluate/*/results.csv")
    measured = {(row["job"], row["method"]) for row in csv.DictReader(results.open())}
    first = {method for number, method in measured if number == "0"}
    assert first == {"random", "dmin"}  # and no other of the benchmark's
    rows = table(place, "evaluate")
    assert [row["outcome"] for row in rows] == ["finished", "failed"]
    assert rows[0]["exact_copies recall@1"] == "1.000" and "mean_output" in rows[1]["why"]


@pytest.mark.slow
def test_a_run_is_repeated_from_its_record(place):
    dmin("collect", *COMMON, "noise.seed=9", cwd=place)
    (record,) = [
        file
        for file in place.glob("outputs/runs/collect/*/record.json")
        if "noise.seed=9" in json.loads(file.read_text())["job"]["overrides"]
    ]
    folder = record.parent.relative_to(place)
    again = dmin("repeat", folder, "paths.outputs=again", cwd=place).stdout
    assert "the same as then (rows, bytes, digest, raw_bytes, data, weights)" in again
    written = json.loads(record.read_text())
    written["versions"]["torch"] = "1.0"
    written["results"]["digest"] = "0" * 16
    record.write_text(json.dumps(written))
    assert '"1.0" then' in dmin("repeat", folder, "--dry", cwd=place).stdout
    assert '"0000000000000000" then' in dmin("repeat", folder, cwd=place).stdout


def test_a_repeated_benchmark_keeps_the_settings_of_its_method(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from dmin.cli.commands import evaluate
    from dmin.cli.config import compose
    from dmin.cli.tools import repeat
    from dmin.cli.workspace import benchmark

    seen = []

    def step(cfg):
        folder = Path(HydraConfig.get().runtime.output_dir)
        evaluate.only_the_chosen_method(cfg)
        with recorded(cfg, folder, "evaluate"):
            named = SimpleNamespace(methods=cfg.benchmark.methods, without=(), settings={})
            built, _ = benchmark.chosen_methods(SimpleNamespace(cfg=cfg), named)
            seen.append((folder, {name: method.name for name, method in built.items()}))
            seen.append(built["trak"].alpha)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "evaluate", step)
    compose.run(step, "evaluate", ["experiment=digits", "method=trak", "method.alpha=0.7"])
    (folder, first), alpha = seen
    repeat.run([str(folder)])
    assert (
        seen[3] == alpha == 0.7 and seen[2][1] == first and set(first) == {"random", "dmin", "trak"}
    )
    repeat.run([str(seen[2][0]), "method.alpha=0.2"])  # a repeat is repeated as well
    assert seen[5] == 0.2


def test_what_cannot_be_repeated_is_said(tmp_path, capsys):
    assert main(["repeat", str(tmp_path)]) == 1
    assert "record.json and config.yaml" in capsys.readouterr().err


@pytest.mark.slow
def test_training_is_logged_beside_its_record(place):
    (metrics,) = place.glob("outputs/runs/train/*/csv/metrics.csv")
    assert len([row for row in csv.DictReader(metrics.open()) if float(row["loss"]) > 0]) == 5
    assert "learning_rate" in metrics.with_name("hparams.yaml").read_text()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is there")
def test_a_logger_that_is_not_installed_is_named(place):
    other = "model.path=outputs/models/other"
    refused = refusal("train", *COMMON, other, "logger=wandb", cwd=place)
    assert "pip install 'dmin[wandb]'" in refused
