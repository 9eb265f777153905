import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from dmin.cli.config import compose, explain, subtrees
from dmin.cli.config.compose import run
from dmin.runtime.errors import DminError

CONF = {
    "dmin": """\
        defaults: [model: small, _self_]
        seed: 0
        name: toy
        logger: null
        benchmark: {store: here, extra: "???"}
        hydra:
          run: {dir: "OUT/run"}
          sweep: {dir: "OUT/sweep"}
          output_subdir: null
          job_logging: {version: 1, disable_existing_loggers: false}
          hydra_logging: {version: 1, disable_existing_loggers: false}
        """,
    "model/small": "width: 1\n",
    "model/large": "width: 9\n",
    "model/broken": "width: [1\n",
    "model/unset": "defaults: [{/data: '???'}]\n",
    "data/digits": "size: 8\n",
    "data/faces": "size: 64\n",
    "model/chained": "defaults: [/data: nowhere]\n",
}


class Recorder:
    """A step that keeps the configurations it was given."""

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.seen: list[DictConfig] = []
        self.argv: list[str] = []
        self.full_error: str | None = None
        self.act = act

    def __call__(self, cfg: DictConfig) -> None:
        self.seen.append(cfg)
        self.argv, self.full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
        self.act()


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in CONF.items():
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("OUT", str(tmp_path)))
    monkeypatch.setattr(compose, "config_directory", lambda: tmp_path / "conf")
    monkeypatch.setattr(subtrees, "READS", {"collect": ("model",), "evaluate": ("benchmark",)})
    monkeypatch.setattr(explain, "groups", lambda: {"model": [], "experiment": []})
    monkeypatch.setattr(sys, "argv", ["/bin/dmin", "collect", "as typed"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*argv: str, step: Recorder | None = None) -> str:
    with pytest.raises(SystemExit) as caught:
        run(step or Recorder(), "collect", list(argv))
    message = caught.value.code
    assert isinstance(message, str) and message and "\n" not in message, "one paragraph"
    return message


def raiser(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def test_step_gets_the_composed_configuration() -> None:
    step = Recorder()
    run(step, "collect", ["seed=3", "model=large"])
    assert [(cfg.seed, cfg.model.width, "hydra" in cfg) for cfg in step.seen] == [(3, 9, False)]


def test_job_has_the_name_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    run(Recorder(), "collect", ["--cfg", "hydra", "--package", "hydra.job.name"])
    assert capsys.readouterr().out == "collect\n"
    run(Recorder(), "collect", ["--cfg=hydra", "--package=hydra.job.name", "hydra.job.name=mine"])
    assert capsys.readouterr().out == "mine\n"


def test_step_sees_the_process_as_it_was() -> None:
    step = Recorder()
    run(step, "collect", [])
    assert step.argv == ["/bin/dmin", "collect", "as typed"]
    assert step.full_error is None
    assert sys.argv == ["/bin/dmin", "collect", "as typed"]
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_sweep_runs_one_job_for_each_value(capsys: pytest.CaptureFixture[str]) -> None:
    step = Recorder()
    run(step, "collect", ["-m", "seed=1,2", "model=small,large"])
    seen = [(cfg.seed, cfg.model.width) for cfg in step.seen]
    assert seen == [(1, 1), (1, 9), (2, 1), (2, 9)]


def test_options_may_stand_among_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    step = Recorder()
    run(step, "collect", ["seed=1,2", "-m", "model=large"])
    assert [(cfg.seed, cfg.model.width) for cfg in step.seen] == [(1, 9), (2, 9)]
    run(step, "collect", ["seed=1", "--config-dir", "conf", "model=large"])
    assert len(step.seen) == 3
    run(step, "collect", ["seed=7", "--cfg", "job", "-p", "seed"])
    assert capsys.readouterr().out.endswith("7\n")


def test_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(Recorder(), "collect", ["--confg-dir", "x"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --confg-dir" in capsys.readouterr().err


def test_composed_configuration_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    step = Recorder()
    run(step, "collect", ["--cfg", "job", "model=large"])
    assert "width: 9" in capsys.readouterr().out
    assert not step.seen


@pytest.mark.parametrize("multirun", [[], ["-m"]])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.widht=3", "There is no setting model.widht. Did you mean model.width?"),
        ("sed=3", "There is no setting sed. Did you mean seed?"),
        ("width=3", "There is no setting width. Did you mean model.width?"),
        ("experimnt=x", "Did you mean experiment?"),
        ("modell=large", "There is no setting modell. Did you mean model?"),
        ("hydra.run.dri=x", "Did you mean hydra.run.dir?"),
        (
            "model=smal",
            "In 'dmin': Could not find 'model/smal'. Did you mean small? "
            "Choices of model: broken, chained, large, small, unset.",
        ),
        ("model=chained", "In 'model/chained': Could not find 'data/nowhere'."),
        (
            "model=unset",
            "No choice of data@model.data. Set data@model.data=<choice>. Choices: digits, faces.",
        ),
        ("model=broken", "not valid YAML"),
        ("hydra.job.num=x", "Cannot set hydra.job.num=x: Value 'x' of type 'str' could not be"),
        ("prompt='a", "Cannot read prompt='a: "),
        ("large", "large is not a setting: write key=value, as in large=..."),
        ("~nothing", "Could not delete from config. 'nothing' does not exist."),
    ],
)
def test_composition_error_is_one_paragraph(
    override: str, said: str, multirun: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    step = Recorder()
    assert said in refused(*multirun, override, step=step)
    assert not step.seen
    assert "Traceback" not in capsys.readouterr().err


def test_settings_of_hydra_are_not_meant_by_others() -> None:
    assert refused("verbse=true") == (
        "There is no setting verbse. --cfg job shows all settings."  # hydra.verbose is near
    )


def test_choice_in_a_sweep_is_refused() -> None:
    assert "Did you mean small?" in refused("-m", "model=large,smal")


def test_unknown_main_configuration_is_refused() -> None:
    message = refused("--config-name", "dminn")
    assert "Cannot find primary config 'dminn'" in message
    assert message.endswith(f"Looked in: {Path('conf').resolve()}.")


def test_sweep_without_multirun_is_refused() -> None:
    assert "Ambiguous value for argument 'seed=1,2'" in refused("seed=1,2")


def test_missing_config_directory_is_refused() -> None:
    assert "not found" in refused("--config-dir", "nowhere")


def test_configuration_is_validated_before_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    step = Recorder()
    assert refused("+sed=1", step=step).startswith("sed is not a setting of dmin.")
    assert refused("seed=one", step=step).startswith("seed is 'one' (str), but dmin takes int")
    assert not step.seen
    assert capsys.readouterr().err == "", "the message alone"


def test_only_what_a_command_reads_must_have_values() -> None:
    run(step := Recorder(), "collect", [])
    assert step.seen[0] == {"seed": 0, "name": "toy", "logger": None, "model": {"width": 1}}
    with pytest.raises(SystemExit, match=r"No value for benchmark\.extra"):
        run(Recorder(), "evaluate", [])


def test_a_setting_for_another_command_is_refused() -> None:
    assert refused("-m", "seed=1,2", "benchmark.store=x") == (
        "benchmark.store is a setting of `dmin evaluate`, which `dmin collect` does not read. "
        "Leave it out."
    )
    assert "model@benchmark.extra is a setting" in refused("+model@benchmark.extra=small")


def test_files_in_the_working_directory_can_be_targets(workplace: Path) -> None:
    (workplace / "own_toy.py").write_text("def build(size: int) -> None: ...")
    step = Recorder()
    run(step, "collect", ["+model._target_=own_toy.build", "~model.width", "+model.size=1"])
    assert step.seen and sys.modules.pop("own_toy")


def test_refusal_of_the_step_is_its_message_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(step=Recorder(raiser(DminError("no store here")))) == "no store here"
    assert capsys.readouterr().err == ""


def test_refusal_in_a_sweep_stops_no_other_job(capsys: pytest.CaptureFixture[str]) -> None:
    step = Recorder(raiser(DminError("no store here")))
    assert "2 of 2 jobs failed" in refused("-m", "seed=1,2", step=step)
    assert len(step.seen) == 2
    told = capsys.readouterr()
    assert "job 0 failed: no store here" in told.err and "sweep of 2 jobs" in told.out


def test_defect_in_a_sweep_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    step = Recorder(raiser(TypeError("a defect")))
    assert "1 of 1 jobs failed" in refused("-m", "seed=1", step=step)
    told = capsys.readouterr()
    assert "Traceback" in told.err and "TypeError: a defect" in told.out


def test_refusal_inside_instantiate_is_its_message_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hydra.utils import instantiate

    monkeypatch.setattr(sys.modules[__name__], "refusing", raiser(DminError("no")), raising=False)
    node = {"_target_": f"{__name__}.refusing"}
    assert refused(step=Recorder(lambda: instantiate(node))) == "no"
    assert capsys.readouterr().err == ""


def test_defect_inside_instantiate_keeps_its_exception() -> None:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    with pytest.raises(InstantiationException, match="ZeroDivisionError"):
        node = {"_target_": "operator.truediv", "_args_": [1, 0]}
        run(Recorder(lambda: instantiate(node)), "collect", [])


def test_defect_keeps_its_exception() -> None:
    with pytest.raises(ZeroDivisionError):
        run(Recorder(raiser(ZeroDivisionError())), "collect", [])


@pytest.mark.parametrize(
    ("argv", "error"), [([], "DminError"), (["model=smal"], "MissingConfigException")]
)
def test_full_error_keeps_every_exception(
    argv: list[str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception) as caught:
        run(Recorder(raiser(DminError("no"))), "collect", argv)
    assert type(caught.value).__name__ == error


def exit_after_interrupt() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize("act", [raiser(KeyboardInterrupt()), exit_after_interrupt])
@pytest.mark.parametrize("multirun", [[], ["-m", "seed=1"]])
def test_interrupt_is_one_line(
    act: Any, multirun: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(Recorder(act), "collect", multirun)
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted."


def test_exit_of_the_step_is_left_alone() -> None:
    with pytest.raises(SystemExit) as caught:
        run(Recorder(lambda: sys.exit(3)), "collect", [])
    assert caught.value.code == 3


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("dmin col", "collect"),
        ("dmin collect model=", "model=broken model=chained model=large model=small model=unset"),
        ("dmin collect seed=1 model.w", "model.width="),
    ],
)
def test_shell_completion(line: str, answer: str, workplace: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from dmin.cli import main; from dmin.cli.config "
        "import compose; "
        f"compose.config_directory = lambda: Path({str(workplace / 'conf')!r}); "
        "main(['-sc', 'query=bash'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "COMP_LINE": line, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.split() == answer.split(), done.stderr
