"""A command is given, and shows, what it reads of a configuration."""

import copy

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dmin.cli import help as pages, main
from dmin.cli.commands import step_of
from dmin.cli.config.groups import config_directory, groups
from dmin.cli.config.subtrees import READS, needed, prune, reads, require_read
from dmin.cli.config.validate import validate
from dmin.runtime.errors import DminError

_OF_ANY = ("detection", "dmin_paper")  # benchmarks of any model and data
OVERLAYS = [
    *([f"experiment={name}"] for name in groups()["experiment"]),
    *(["experiment=digits", f"debug={name}"] for name in groups()["debug"]),
    *(["experiment=digits", f"benchmark={name}"] for name in _OF_ANY),
    *([f"benchmark={name}"] for name in groups()["benchmark"] if name not in _OF_ANY),
]


@pytest.fixture(scope="module", params=OVERLAYS, ids=" ".join)
def overlay(request):
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        cfg = compose("dmin", [*request.param, "name=test"])
    for missing in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, missing, "here")
    return cfg


@pytest.mark.parametrize("command", READS)
def test_every_overlay_is_pruned_to_what_every_command_reads(overlay, command):
    cfg = prune(copy.deepcopy(overlay), command)
    assert all(reads(command, str(section)) for section in cfg)
    OmegaConf.to_container(cfg, resolve=True)  # nothing points to what is gone
    validate(cfg, needed(command))
    again = copy.deepcopy(cfg)
    assert prune(again, command) == cfg, "as its record is, when it is repeated"


def test_what_is_pointed_to_stays_and_what_nobody_knows():
    kept = {"data": {"size": "${retrieve.k}"}, "skech": 1, "model": {"path": "x"}}
    cfg = {**kept, "retrieve": {"k": 3, "rows": 1}, "outliers": {"k": 1}, "method": None}
    cfg["model"] = {"path": "x", "shift": 2}
    assert prune(OmegaConf.create(cfg), "train") == {**kept, "retrieve": {"k": 3}}


@pytest.mark.parametrize(
    ("command", "typed", "known"),
    [
        ("collect", "retrieve.k=3", "`dmin retrieve`, `dmin serve`, `dmin demo`"),
        ("train", "model.shift=3", "`dmin collect`"),
        ("doctor", "~queries", "`dmin sample`"),
        ("retrieve", "method@benchmark.tasks.x=dmin", "`dmin evaluate`, `dmin demo`"),
    ],
)
def test_what_is_typed_for_another_command_is_refused(command, typed, known):
    with pytest.raises(
        DminError, match=rf"is a setting of .*{known}.*, which `dmin {command}` does not"
    ):
        require_read(command, ["seed=1", typed])


def test_what_is_typed_of_a_part_a_group_or_for_hydra_passes():
    for typed in ("model=ddpm", "+model.path=x", "train=digits_unet", "experiment=digits"):
        require_read("train", [typed, "hydra.run.dir=x", "hydra/launcher=slurm", "skech.dim=1"])
    require_read("evaluate", ["queries.root=x"])


def test_shown_and_listed_are_the_same_parts(capsys):
    main(["collect", "experiment=digits", "--cfg", "job"])
    shown = OmegaConf.create(capsys.readouterr().out)
    assert {"collect", "model", "trainer"} < set(shown) and not set(shown) & {"train", "retrieve"}
    main(["collect", "--help"])
    page = capsys.readouterr().out
    assert "\n  sketch " in page and "\n  experiment " in page and "\n  method " not in page


def test_commands_and_table_agree():
    assert set(READS) == set(pages.COMMANDS) - set(pages.TOOLS)
    assert all(step_of(name).name == name for name in READS)
