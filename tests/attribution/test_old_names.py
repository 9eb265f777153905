"""What was a class of 0.1.0 and is a setting of another today: by its old name and by its YAML."""

from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate

import dmin.attribution
from dmin.cli.config.groups import config_directory

OLD = {
    "DMinUnnormalised": "dmin_unnormalised",
    "DTRAK": "d_trak",
    "DTRAKEnsemble": "d_trak_ensemble",
    "GAS": "gas",
    "RelativeIF": "relative_if",
    "RenormalisedIF": "renormalised_if",
    "SpectralEnergy": "spectral_energy",
    "TracIn": "tracin",
}


def facts(method):
    return {
        key: facts(value) if isinstance(value, dmin.attribution.Method) else str(value)
        for key, value in vars(method).items()
    }


@pytest.mark.parametrize("old", OLD)
def test_the_old_name_makes_what_the_yaml_does(old):
    file = Path(config_directory()) / "method" / f"{OLD[old]}.yaml"
    settings = yaml.safe_load(file.read_text())
    by_yaml, by_name = instantiate(settings), getattr(dmin.attribution, old)()
    by_target = instantiate({"_target_": f"dmin.attribution.{old}"})
    assert facts(by_yaml) == facts(by_name) == facts(by_target)
    assert by_yaml.name == OLD[old] and type(by_yaml) is type(by_name)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Tracing'"):
        dmin.attribution.Tracing  # noqa: B018
