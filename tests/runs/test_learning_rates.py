"""Methods over checkpoints take those of a run, each by the learning rates of its stretch."""

import json
from pathlib import Path

import numpy as np
import pytest
from runs.test_end_to_end import KOHYA
from runs.test_trainers import AI_TOOLKIT, PIPE, PIPE_DATA, written
from runs.tiny import header_only, images

from dmin.cli.config.line import parse
from dmin.runs.recognise import read_run
from dmin.runtime.errors import DminError


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images()
    return tmp_path


def asked(files, *more):
    """Return what a line makes of the method's settings."""
    line = parse("retrieve", [f"run={written(files)}", "img/plain/e.png", "method=tracin", *more])
    return line.root.get("method")


def rates(name, steps, warmup=0):
    """The learning rate of every step, as the trainers' schedulers have it."""
    s = np.arange(steps) + 0.5
    falls = (1 + np.cos(np.pi * (s - warmup) / (steps - warmup))) / 2 if name == "cosine" else 1
    return np.where(s < warmup, s / max(warmup, 1), falls)


@pytest.mark.parametrize(
    "told, warmup",
    [
        ({}, 0),
        ({"lr_scheduler": "cosine"}, 0),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 100}, 100),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 0.5}, 500),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 100}, 0),
    ],
)
def test_each_checkpoint_counts_by_the_learning_rates_up_to_it(place, told, warmup):
    ends = {"mug-000001": 300, "mug-000002": 400, "mug": 1000}
    for name, step in ends.items():
        header_only(f"out/{name}.safetensors", ss_steps=str(step))
    found = asked(
        {
            **KOHYA,
            "run.toml": {
                **KOHYA["run.toml"],
                "max_train_steps": 1000,
                "max_train_epochs": None,
                **told,
            },
        }
    )
    each = rates(told.get("lr_scheduler"), 1000, warmup)
    sums = [each[:300].sum(), each[300:400].sum(), each[400:].sum()]
    assert found["checkpoints"] == ["out/mug-000001.safetensors", "out/mug-000002.safetensors"]
    assert found["weights"] == pytest.approx(np.roll(sums, 1) / 1000, rel=2e-3)


def test_steps_and_epochs_are_read_from_names_and_headers(place):
    for number, name in ((100, "_000000100"), (300, "_000000300"), (400, "")):
        told = {"training_info": json.dumps({"step": number})}
        header_only(f"out/mug/mug{name}.safetensors", **(told if number == 100 else {}))
    settings = AI_TOOLKIT["config"]["process"][0]
    config = {**settings, "train": {**settings["train"], "steps": 400}}
    files = {"run.json": {"job": "extension", "config": {"name": "mug", "process": [config]}}}
    assert asked(files)["weights"] == pytest.approx([0.25, 0.25, 0.5])
    header_only("runs/one/epoch1/lora.safetensors")
    pipe = {"run.toml": {**PIPE, "epochs": 2}, "dp_data.toml": PIPE_DATA}
    assert asked(pipe)["weights"] == pytest.approx([0.5, 0.5])
    Path("img").rename("gone")
    said = read_run(written({**KOHYA}), said={"data": "digits", "adapter": "out/mug.safetensors"})
    assert said.facts["checkpoints"] == []


@pytest.mark.parametrize(
    "told, named",
    [
        ({"lr_scheduler": "polynomial"}, "does not compute its schedule polynomial"),
        ({}, "in no header, name or setting"),
        (
            {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 9, "max_train_epochs": 3},
            "rose for 9 steps, but the number of all steps is not given",
        ),
        ({"max_train_epochs": 1}, "in no header, name or setting"),  # the first is not the last
    ],
)
def test_learning_rates_that_are_not_told_are_asked_for(place, told, named):
    header_only("out/mug-000001.safetensors")
    config = {"max_train_epochs": None, **told}
    files = {**KOHYA, "run.toml": {**KOHYA["run.toml"], **config}}
    with pytest.raises(DminError, match=rf"{named}.*method\.weights=null"):
        asked(files)
    assert asked(files, "method.weights=null") == {"checkpoints": ["out/mug-000001.safetensors"]}
    assert asked(files, "method.checkpoints=[a]") is None


def test_a_run_that_kept_none_is_told_what_is_missing(place):
    with pytest.raises(
        DminError, match=r"has only out/mug\.safetensors.*save intermediate checkpoints"
    ):
        asked(KOHYA)
    assert "method" not in parse("collect", [f"run={written(KOHYA)}"]).root
