"""Names of earlier releases, wherever they enter, mean what they are called today."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from golden import settings
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dmin.attribution import Method
from dmin.cli import main
from dmin.cli.config import renamed, sections
from dmin.cli.config.groups import config_directory
from dmin.cli.config.renamed import current, rename
from dmin.cli.config.validate import validate

# Every YAML file of 0.1.0, by its path.
THEN: dict[str, str] = json.loads((settings.DATA / "conf_0_1_0.json").read_text())
GROUPS = [file.removesuffix(".yaml").rpartition("/")[::2] for file in THEN if "/" in file]
ROOT_KEYS = tuple(each.name for each in sections.settings())
CHOICES = [(group, name) for group, name in GROUPS if group in (*ROOT_KEYS, "experiment", "debug")]


@pytest.fixture(scope="module")
def conf_of_then(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("conf")
    for name, text in THEN.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    return top


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_a_configuration_of_then_is_valid_today(group: str, name: str, conf_of_then: Path) -> None:
    with initialize_config_dir(str(conf_of_then), version_base="1.3"):
        cfg = compose("dmin", settings.overrides(group, name))
    cfg.name, cfg.model.path = "then", "there"
    if OmegaConf.is_missing(cfg.queries, "root"):
        cfg.queries.root = "there"
    rename(cfg)
    validate(cfg, [group] if group in ROOT_KEYS else ["model", "train", "benchmark", "method"])


OLD_METHODS = {
    "DMinUnnormalised": "dmin_unnormalised",
    "DTRAK": "d_trak",
    "DTRAKEnsemble": "d_trak_ensemble",
    "GAS": "gas",
    "RelativeIF": "relative_if",
    "RenormalisedIF": "renormalised_if",
    "SpectralEnergy": "spectral_energy",
    "TracIn": "tracin",
}


def facts(method: Method) -> dict[str, Any]:
    return {
        key: facts(value) if isinstance(value, Method) else str(value)
        for key, value in vars(method).items()
    }


@pytest.mark.parametrize("old", OLD_METHODS)
def test_a_method_of_then_is_made_as_its_yaml_does(old: str) -> None:
    """By its old name alone, and with its settings of then."""
    name = OLD_METHODS[old]
    by_yaml = instantiate(yaml.safe_load((config_directory() / f"method/{name}.yaml").read_text()))
    then = yaml.safe_load(THEN[f"method/{name}.yaml"])
    for given in ({"_target_": f"dmin.attribution.{old}"}, then):
        assert rename(given)
        method = instantiate(given)
        assert facts(method) == facts(by_yaml)
        assert method.name == name and type(method) is type(by_yaml)


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        renamed,
        "TARGETS",
        {
            "old": "new",
            "old.Strong": {"_target_": "new.Kind", "power": 2, "bias": True},
            "old.a.B": "c.D",
        },
    )
    monkeypatch.setattr(renamed, "SETTINGS", {"new.Kind": {"size": "length"}})


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("old.Other", ("new.Other", {})),
        ("old.Strong", ("new.Kind", {"power": 2, "bias": True})),
        ("old.Strong.load", ("new.Kind.load", {"power": 2, "bias": True})),
        ("old.a.B", ("c.D", {})),
        ("older.Other", ("older.Other", {})),
    ],
)
def test_the_longest_name_decides(name: str, found: tuple[str, dict], presets: None) -> None:
    assert current(name) == found


@pytest.mark.parametrize("kind", [dict, OmegaConf.create])
def test_calls_are_renamed_wherever_they_stand(kind: Any, presets: None) -> None:
    node = kind(
        {
            "method": {"_target_": "old.Strong", "power": 3, "size": "${other}"},
            "list": [{"_target_": "old.a.B", "inner": {"_target_": "mine.Own"}}, 5, None],
            "new": {"_target_": "new.Kind", "size": 2},
            "other": 7,
            "missing": "???",
            "nothing": None,
            "same": "${method}",
        }
    )
    found = rename(node)
    plain = OmegaConf.to_container(OmegaConf.create(node), resolve=False)
    assert plain == {
        "method": {"_target_": "new.Kind", "power": 3, "length": "${other}", "bias": True},
        "list": [{"_target_": "c.D", "inner": {"_target_": "mine.Own"}}, 5, None],
        "new": {"_target_": "new.Kind", "length": 2},
        "other": 7,
        "missing": "???",
        "nothing": None,
        "same": "${method}",
    }
    assert found == {
        "old.Strong": "new.Kind with power=2, bias=True",
        "old.a.B": "c.D",
        "size of new.Kind": "length",
    }
    assert rename(node) == {}


def test_a_configuration_of_ones_own_may_use_old_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder of YAML files, in a method that a benchmark names, and beside a model."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    for group, choice in (
        ("timesteps", "stratified"),
        ("noise", "shared"),
        ("train", "digits_mlp"),
    ):
        (own / group).mkdir(parents=True)
        (own / group / f"{choice}_0.yaml").write_text(THEN[f"{group}/{choice}.yaml"])
    both = ["experiment=digits", "debug=fast", "model=mlp", "--config-dir", str(own)]
    asked = [*both, "train=digits_mlp_0"]
    assert main(["train", *asked]) == 0
    capsys.readouterr()
    assert main(["collect", *both, "timesteps=stratified_0", "noise=shared_0"]) == 0
    said = capsys.readouterr().err
    assert said.count("Warning: ") == 1
    assert "dmin.noise.SharedNoise is dmin.diffusion.SharedNoise now" in said
    (file,) = tmp_path.glob("outputs/models/*/training.json")
    assert "dmin.models.MLP.small" in file.read_text()
    # As 0.1.0 left it.
    file.write_text(file.read_text().replace("dmin.models.MLP", "dmin.models.mlp.MLP"))
    assert main(["train", *asked]) == 0
    assert "model: found" in capsys.readouterr().out
