"""A LoRA of kohya without its config: the header tells the run, its tags prove the captions."""

import json
import shutil
from pathlib import Path

import pytest
from runs.tiny import header_only, picture, pipeline_index, predicts

from dmin.cli.config.line import parse
from dmin.cli.workspace.built import build
from dmin.runs.recognise import read_run
from dmin.runtime.errors import DminError

TAGS = {"3_zqx mug": {"zqx mug": 1, "a mug": 1, "red": 1}}
BUCKETS = {"buckets": {"0": {"resolution": [64, 32], "count": 3}}}
TOLD = {
    "network_module": "networks.lora", "network_dim": "4", "network_alpha": "2.0",
    "base_model_version": "sd_v1", "sd_model_name": "sd", "min_snr_gamma": "5.0",
    "noise_offset": "None", "caption_dropout_rate": "0.1", "v2": "False", "flip_aug": "True",
    "resolution": "(64, 64)", "enable_bucket": "True", "bucket_info": json.dumps(BUCKETS),
    "dataset_dirs": json.dumps({"3_zqx mug": {"n_repeats": 3, "img_count": 2}}),
    "tag_frequency": json.dumps(TAGS), "steps": "30", "session_id": "7",
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline_index("sd", "StableDiffusionPipeline")
    for name in ("a", "b"):
        picture(f"3_zqx mug/{name}.png", (40, 80))
    Path("3_zqx mug/a.txt").write_text("A mug, red\nsecond")
    return tmp_path


def lora(**changes):
    told = {**TOLD, **changes}
    header_only("out/mug.safetensors", **{f"ss_{k}": v for k, v in told.items() if v is not None})
    return Path("out/mug.safetensors")


def test_the_header_tells_the_run(place):
    lora()
    run = read_run(Path("out"))  # a folder that has no config
    assert run.model == {
        "path": "sd",
        "adapter": "out/mug.safetensors",
        "snr_gamma": 5.0,
        "prompt_dropout": 0.1,
        "empty_captions": "keep",
    }
    assert run.unknown == [] and "flip_aug" in run.data["approximated"]
    found = [(e.id, e.caption, e.repeats, *e.image.shape[1:]) for e in build(run.data)]
    assert found == [  # .txt, as the tags prove, and the buckets that it counted
        ("3_zqx mug/a.png", "A mug, red", 3.0, 32, 64),
        ("3_zqx mug/b.png", "zqx mug", 3.0, 32, 64),
    ]


def test_data_sets_of_a_file_are_told_as_well(place):
    subset = {"image_dir": "3_zqx mug", "class_tokens": "zqx mug", "num_repeats": 2, "img_count": 2}
    plain = {"image_dir": "plain", "is_reg": True, "img_count": 1}
    picture("plain/e.png")
    datasets = [{"resolution": [64, 64], "enable_bucket": False, "subsets": [subset, plain]}]
    file = lora(datasets=json.dumps(datasets), dataset_dirs=None)
    data = build(read_run(file, ignore=["is_reg"]).data)
    assert [(e.repeats, *e.image.shape[1:]) for e in data] == [(2.0, 64, 64)] * 2
    # The same folder at another resolution; its tags are counted once.
    datasets.append({**datasets[0], "resolution": [64, 32], "subsets": [subset]})
    file = lora(datasets=json.dumps(datasets), dataset_dirs=None)
    data = build(read_run(file, ignore=["is_reg"]).data)
    assert [e.image.shape[1:] for e in data] == [(64, 64)] * 2 + [(32, 64)] * 2


@pytest.mark.parametrize(
    "change, named",
    [
        ({"tag_frequency": json.dumps({"3_zqx mug": {"cup": 2}})}, "different tags"),
        ({"dataset_dirs": json.dumps({"3_zqx mug": {"img_count": 9}})}, "counts 9 images"),
        ({"dataset_dirs": json.dumps({"5_gone": {}})}, "run.root"),
        ({"dataset_dirs": "{"}, "not JSON"),
        ({"dataset_dirs": None}, "must be a list of one or more tables"),
        ({"base_model_version": "hunyuan-image-2.1"}, "no family of dmin opens"),
        ({"sd_model_name": "gone.safetensors"}, "run.root"),
        ({"zero_terminal_snr": "True"}, "schedule"),
        ({"noise_offset": "much"}, "not a number"),
    ],
)
def test_what_does_not_prove_is_refused(place, change, named):
    with pytest.raises(DminError, match=named):
        read_run(lora(**change))


@pytest.mark.parametrize(
    "version, told, trained",
    [("sd_v2_v", "", "v_prediction"), ("sd_v1", "", "epsilon"), ("sd_v1", "v", "v_prediction")],
)
def test_what_the_network_predicts_is_held_to_the_scheduler(place, version, told, trained):
    told = {"modelspec.prediction_type": told} if told else {}
    for scheduler in ("epsilon", "v_prediction"):
        predicts("sd", scheduler)
        file = lora(base_model_version=version)
        header = {f"ss_{k}": v for k, v in {**TOLD, "base_model_version": version}.items()}
        header_only(file, **header, **told)
        if scheduler == trained:
            read_run(file)
            continue
        with pytest.raises(DminError, match=f"prediction_type to {trained} there"):
            read_run(file)


def test_files_of_other_trainers_are_no_run(place):
    shutil.rmtree("3_zqx mug")
    with pytest.raises(DminError, match="no config of a known trainer"):
        read_run(lora(network_module=None))


def test_data_that_the_line_names_are_not_looked_for(place):
    shutil.rmtree("3_zqx mug")
    lora(dataset_dirs=None, tag_frequency=None)
    line = ["run=out/mug.safetensors", "data=training_folder", "data.root=mine"]
    found = parse("collect", line)
    assert "data" not in found.root and any("set by you" in note for note in found.notes)
