"""Every experiment can be found, understood and run again by whoever has only its folder."""

import json
import runpy
import shlex
from pathlib import Path

import pytest
import yaml

from experiments.record import results

HERE = Path(__file__).resolve().parents[1] / "experiments"
listing = runpy.run_path(str(HERE / "__main__.py"), run_name="experiments")
EXPERIMENTS = listing["experiments"]()


def test_each_folder_is_an_experiment():
    folders = {p.name for p in HERE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_says_its_question_command_time_and_hardware(name):
    found, text = EXPERIMENTS[name], (HERE / name / "README.md").read_text()
    assert set(found) - {"overlay"} == set(listing["KEYS"])
    assert found == {k: str(v) for k, v in next(yaml.safe_load_all(text)).items()}  # valid YAML
    assert found["question"].endswith("?") and float(found["minutes"]) > 0
    lacking = [found[key] for key in ("results", "plot") if not (HERE / name / found[key]).exists()]
    assert not lacking
    body = text.split("\n---\n", 1)[1]
    assert found["command"] in body and Path(found["plot"]).name in body


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_its_command_is_there_to_be_run(name):
    program, *arguments = shlex.split(EXPERIMENTS[name].get("command", "make experiments"))
    if program == "python":
        assert (HERE.parent / arguments[0]).is_file()
    elif program == "make":
        assert f"\n{arguments[0]}:" in (HERE.parent / "Makefile").read_text()
    else:
        from dmin.cli.help import COMMANDS

        assert program == "dmin" and arguments[0] in COMMANDS
        assert (HERE.parent / EXPERIMENTS[name]["overlay"]).is_file()


def test_the_list_names_each(capsys):
    listing["main"]()
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in EXPERIMENTS)


@pytest.mark.parametrize("record", sorted(HERE.rglob("record.json")), ids=str)
def test_its_record_is_that_of_its_results(record):
    found = json.loads(record.read_text())
    assert str(Path.home()) not in record.read_text() and '"/' not in record.read_text()
    if "runs" in found:  # of a script; those of commands are compared by `dmin repeat`
        assert found["results"] == results(record.parent)
