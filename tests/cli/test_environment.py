"""What the environment says is in no record, also where it was used."""

import json
import os

import pytest
from golden.settings import RECORDS, dmin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmin.cli.config.environment import kept, without_values

SECRET = "s3cret-t0ken"


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("DMIN_TEST_TOKEN", SECRET)
    monkeypatch.setenv("SLURM_PROCID", "3")


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:DMIN_TEST_TOKEN}",
        "a/${oc.env:DMIN_TEST_TOKEN}/b",
        "${oc.decode:${oc.env:DMIN_TEST_TOKEN}}",
        "${oc.env:${which}}",
        "${other.token}",
        "${oc.select:other.token,1}",
        "${oc.env:NOT_SET_HERE,${oc.env:DMIN_TEST_TOKEN}}",
    ],
)
def test_what_the_environment_says_stays_as_it_was_written(text):
    given = {"which": "DMIN_TEST_TOKEN", "a": [{"b": text, "c": "${which}"}], "other": {}}
    given["other"] = {"token": "${oc.env:DMIN_TEST_TOKEN}", "n": 1, "none": None, "later": "???"}
    cfg = OmegaConf.create(given)
    settings, read = kept(cfg)
    assert settings == {**given, "a": [{"b": text, "c": "DMIN_TEST_TOKEN"}]}
    assert SECRET not in json.dumps(settings) and read["DMIN_TEST_TOKEN"] == SECRET
    assert OmegaConf.to_container(cfg, resolve=True)["other"]["token"] == SECRET  # as before


def test_all_else_is_resolved_and_told_if_it_cannot_be():
    shard = {"id": "${oc.decode:${oc.env:SLURM_PROCID}}", "where": "${.id}"}
    assert kept(OmegaConf.create(shard)) == ({"id": 3, "where": 3}, {})
    with pytest.raises(OmegaConfBaseException):
        kept(OmegaConf.create({"a": "${nowhere}", "b": "${oc.env:DMIN_TEST_TOKEN}"}))
    for file in RECORDS.glob("*/config.yaml"):
        cfg = OmegaConf.load(file)
        assert OmegaConf.to_yaml(OmegaConf.create(kept(cfg)[0])) == file.read_text()


def test_texts_that_quote_it_name_the_variable():
    found = {"a": [f"{SECRET}/x", 3, None], "b": {"c": f"no {SECRET}"}}
    assert without_values(found, {"X": SECRET, "Y": "", "Z": "no"}) == {
        "a": ["${oc.env:X}/x", 3, None],
        "b": {"c": "no ${oc.env:X}"},
    }


SMALL = [
    *("experiment=digits", "debug=fast", "model=mlp", "train=digits_mlp", "extras.threads=1"),
    *("name='${oc.env:DMIN_TEST_TOKEN}'", "model.path='model-${oc.env:DMIN_TEST_TOKEN}'"),
    *("logger=csv", "data.split=heldout"),
]


@pytest.mark.slow
def test_no_file_of_a_run_holds_it_and_repeating_asks_for_trust(tmp_path, monkeypatch, capsys):
    for _ in range(2):  # made, then found
        status, shown = dmin("train", *SMALL, place=tmp_path)
        assert status == 0
    first, _ = sorted((tmp_path / "outputs/runs/train").iterdir())
    told = [file for file in tmp_path.rglob("*") if file.suffix in (".json", ".yaml", ".csv")]
    assert len(told) > 8
    assert b"\r" not in (first / "csv" / "metrics.csv").read_bytes()
    for file in told:
        assert SECRET not in file.read_text(), file
    assert "name: ${oc.env:DMIN_TEST_TOKEN}" in shown
    assert "name: ${oc.env:DMIN_TEST_TOKEN}" in (first / "config.yaml").read_text()
    status, _ = dmin("repeat", str(first), place=tmp_path)
    assert status == 1 and "reads ${oc.env:DMIN_TEST_TOKEN}" in capsys.readouterr().err
    status, shown = dmin("repeat", str(first), "--trust", place=tmp_path)
    assert status == 0 and "found" in shown
    monkeypatch.setenv("DMIN_TEST_TOKEN", "another")
    os.rename(tmp_path / f"model-{SECRET}", tmp_path / "model-another")
    monkeypatch.setenv("DMIN_TEST_SPLIT", "train")
    with pytest.raises(SystemExit, match="other settings"):
        dmin("train", *SMALL[:-1], "data.split='${oc.env:DMIN_TEST_SPLIT}'", place=tmp_path)
