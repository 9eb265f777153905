"""Scripts keep a record beside their results, from which they are repeated elsewhere."""

import json
import sys

import pytest

from dmin.cli import main
from experiments.record import recorded
from experiments.repeat import run as repeat

SCRIPT = """
import json, pathlib, sys
from experiments.record import recorded
here = pathlib.Path(__file__).parent
with recorded(__file__, seeds=[3]):
    results = here / "results.json"
    known = json.loads(results.read_text()) if results.exists() else []
    if len(known) < 2 and "stop" not in sys.argv:
        known += [{"error": 0.5, "seconds": float(len(known))}]
    results.write_text(json.dumps(known))
    (here / "table.csv").write_text("name,error\\na,0.25\\nb,0.5\\n")
    cache = pathlib.Path("outputs/kept")
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("x")
    if "fail" in sys.argv:
        raise ValueError("no")
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    folder = tmp_path / "experiments" / "tiny"
    folder.mkdir(parents=True)
    (folder / "run.py").write_text(SCRIPT)
    (folder / "README.md").write_text("# Tiny\n")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        script = str(folder / "run.py")
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        exec(compile(SCRIPT, script, "exec"), {"__file__": script})
        return json.loads((folder / "record.json").read_text())

    run.folder = folder
    return run


def test_the_record_tells_command_settings_code_versions_and_machine(experiment, capsys):
    record = experiment("--only", "a")
    (run,) = record["runs"]
    assert run["command"] == ["experiments/tiny/run.py", "--only", "a"]
    assert run["settings"] == {"seeds": [3]}
    assert run["outcome"] == "finished" and run["seconds"] >= 0 and len(run["code"]) == 16
    assert "torch" in run["versions"] and run["machine"]["cores"] and run["peak_memory_bytes"]
    assert set(record["results"]) == {"results.json", "table.csv"}  # neither sources nor README
    assert "python experiments repeat tiny" in capsys.readouterr().out


def test_a_run_that_goes_on_is_one_and_another_command_a_second(experiment):
    experiment()
    assert [run["parts"] for run in experiment()["runs"]] == [2]
    assert len(experiment()["runs"]) == 1  # the third changed nothing
    (experiment.folder / "table.csv").write_text("cut off")
    record = experiment("--report")
    assert [run["command"][1:] for run in record["runs"]] == [[], ["--report"]]
    for file in ("results.json", "table.csv"):
        (experiment.folder / file).unlink()
    assert [run["command"][1:] for run in experiment("anew")["runs"]] == [["anew"]]


def test_a_run_that_failed_says_why(experiment):
    with pytest.raises(ValueError, match="no"):
        experiment("fail")
    record = json.loads((experiment.folder / "record.json").read_text())
    assert record["runs"][0]["outcome"] == "ValueError: no"


def test_a_process_of_a_recorded_script_keeps_no_record(tmp_path):
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    for each in (outer, inner):
        each.mkdir()
    with recorded(str(outer / "run.py")), recorded(str(inner / "run.py")):
        pass
    assert (outer / "record.json").is_file() and not (inner / "record.json").exists()


def test_repeating_runs_in_a_copy_and_says_what_differs(experiment, tmp_path, capfd):
    experiment()
    experiment()
    file = experiment.folder / "record.json"
    record = json.loads(file.read_text())
    record["runs"][0]["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(record))
    table = experiment.folder / "table.csv"
    table.write_text("name,error\na,0.2\nb,0.5\n")
    before = {each: each.read_bytes() for each in experiment.folder.iterdir() if each.is_file()}
    assert repeat([str(experiment.folder), "--dry"]) == 0
    shown = capfd.readouterr().out
    assert '"1.0" then' in shown and "python experiments/tiny/run.py" in shown
    assert not (tmp_path / "outputs/repeats").exists()
    assert repeat([str(experiment.folder), "--into", "again"]) == 0
    said = capfd.readouterr().out
    assert "results.json: 0 values more, 2 less" in said  # it ran once, from nothing
    assert "table.csv: error differs in 1 of 2, by at most 0.2 of itself" in said
    assert repeat([str(experiment.folder), "--into", "again"]) == 0
    assert "results.json: the same, byte for byte" in capfd.readouterr().out
    assert {each: each.read_bytes() for each in before} == before


def test_what_cannot_be_repeated_is_said(experiment, capfd):
    experiment()
    (experiment.folder / "run.py").unlink()
    assert repeat([str(experiment.folder)]) == 1
    assert "which is not in" in capfd.readouterr().err


OUTSIDE = {
    "another script": (["experiments/other.py"], {}),
    "an absolute one": (["/bin/true.py"], {}),
    "one above": (["experiments/tiny/../../evil.py"], {}),
    "a link": (["experiments/tiny/link.py"], {}),
    "an option": (["-c", "open('ran', 'w')"], {}),
    "a module": (["-m", "evil"], {}),
    "no command": ([], {}),
    "a text": ("experiments/tiny/run.py", {}),
    "numbers": ([1], {}),
    "a result elsewhere": (["experiments/tiny/run.py"], {"../../secret.csv": "0"}),
    "results of another kind": (["experiments/tiny/run.py"], 3),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_only_scripts_of_its_own_folder_are_run(kind, experiment, tmp_path, capfd):
    experiment()
    for name in ("evil.py", "experiments/other.py"):
        (tmp_path / name).write_text("open('ran', 'w')")
    (experiment.folder / "link.py").symlink_to(tmp_path / "evil.py")
    command, results = OUTSIDE[kind]
    record = {"runs": [{"command": command}], "results": results}
    (experiment.folder / "record.json").write_text(json.dumps(record))
    for more in ([], ["--dry"]):
        assert repeat([str(experiment.folder), *more]) == 1
        assert "record.json" in capfd.readouterr().err
    assert not list(tmp_path.rglob("ran")) and not (tmp_path / "outputs/repeats").exists()


def test_the_command_names_what_repeats_an_experiment(experiment, capfd):
    experiment()
    assert main(["repeat", str(experiment.folder)]) == 1
    assert "python experiments repeat tiny" in capfd.readouterr().err
