import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dmin.cli import help as pages, main
from dmin.cli.config import groups as choices
from dmin.cli.config.groups import config_directory, did_you_mean, groups
from dmin.cli.config.validate import validate


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("dmin", "model/ddpm", "model/dit", "hydra/launcher/slurm", "data/digits"):
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.setattr(choices, "config_directory", lambda: tmp_path)
    return tmp_path


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["collect", "--help"], ["x"]])
def test_help_imports_the_standard_library_alone(arguments: list[str]) -> None:
    program = (
        "import sys; before = set(sys.modules); from dmin.cli import main; "
        f"main({arguments}); loaded = {{name.partition('.')[0] for name in sys.modules}}; "
        "print('others:', sorted(loaded - {*before, *sys.stdlib_module_names, 'dmin'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "others: []" in done.stdout, done.stdout + done.stderr


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in pages.COMMANDS)
    assert main([]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("command", pages.COMMANDS)
def test_page_describes_the_command(
    command: str, conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "model=dit", "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(pages.COMMANDS[command])
    assert ("--cfg job" in printed) == (command not in pages.TOOLS)


@pytest.mark.parametrize("command", [name for name in pages.COMMANDS if name not in pages.TOOLS])
def test_the_example_of_every_page_composes_and_is_valid(command: str) -> None:
    example = next(
        line for line in pages.page(command).splitlines() if line.startswith(f"  dmin {command} ")
    )
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        cfg = compose("dmin", example.split()[2:])
    validate(cfg)


def test_page_shows_groups_and_choices(conf: Path) -> None:
    page = pages.page("collect")
    assert "  model             ddpm, dit\n" in page
    assert "  hydra/launcher    slurm\n" in page


def test_groups_are_folders_with_yaml_files(conf: Path) -> None:
    (conf / "empty").mkdir()
    expected = {"data": ["digits"], "hydra/launcher": ["slurm"], "model": ["ddpm", "dit"]}
    assert groups(conf) == expected


def test_every_line_of_a_page_is_readable(conf: Path) -> None:
    for number in range(60):
        (conf / "model" / f"model_number_{number}.yaml").touch()
    assert max(map(len, pages.page("collect").splitlines())) <= 100


def test_configuration_directory_is_in_the_package_or_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "__file__", str(tmp_path / "dmin/cli/config/groups.py"))
    assert config_directory() == tmp_path / "conf"
    (tmp_path / "dmin" / "conf").mkdir(parents=True)
    assert config_directory() == tmp_path / "dmin" / "conf"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("colect", "Did you mean collect?"),
        ("xyzzy", "there is no command xyzzy. Commands: train, collect"),
        ("--cfg", "name a command before --cfg"),
    ],
)
def test_unknown_command_is_refused(
    given: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([given]) == 2
    streams = capsys.readouterr()
    assert said in streams.err
    assert not streams.out


@pytest.mark.parametrize(
    ("name", "options", "answer"),
    [
        ("skech.dim", ["sketch.dim", "sketch.seed", "model.dim"], "Did you mean sketch.dim?"),
        ("dim", ["sketch.dim", "sketch.seed"], "Did you mean sketch.dim?"),
        ("dppm", ["ddpm", "dit", "flux"], "Did you mean ddpm?"),
        ("DDPM", ["ddpm"], "Did you mean ddpm?"),
        ("bcd", ["bce", "bcf"], "Did you mean bce or bcf?"),
        ("zzz", ["ddpm", "dit"], ""),
        ("a", [], ""),
    ],
)
def test_did_you_mean(name: str, options: list[str], answer: str) -> None:
    assert did_you_mean(name, options) == answer
