"""Whatever is wrong with a configuration is a sentence that names the setting, not a traceback."""

import pytest

from dmin.cli import main

DIGITS = ["data=digits", "model=ddpm", "model.path=x"]
WRONG = {
    "no path to train to": (
        "train",
        ["model=ddpm", "data=digits", "train=digits_unet"],
        "model.path",
    ),
    "no model": ("train", ["data=digits", "train=digits_unet"], "model.path=<value>"),
    "leads nowhere": ("collect", [*DIGITS, "sketch.dim=${nope}"], "sketch.dim"),
    "leads to itself": ("collect", [*DIGITS, "extras.threads=${extras.threads}"], "extras.threads"),
    "no variable": ("collect", [*DIGITS, "paths.outputs=${oc.env:NOT_SET_HERE}"], "NOT_SET_HERE"),
    "cannot be decoded": ("collect", [*DIGITS, "seed=${oc.decode:'['}"], "seed"),
    "no such resolver": ("collect", [*DIGITS, "seed=${nope:1}"], "seed"),
    "no outputs": ("collect", [*DIGITS, "paths=???"], "paths"),
    "no section": ("collect", [*DIGITS, "~extras"], "extras"),
    "no seed": ("collect", [*DIGITS, "seed=???"], "seed"),
    "no run folder": ("collect", [*DIGITS, "hydra.run.dir=${nope}"], "hydra.run.dir"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_error_of_the_configuration_is_a_sentence(kind, tmp_path, monkeypatch):
    command, asked, named = WRONG[kind]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([command, *asked])
    assert isinstance(end.value.code, str) and named in end.value.code
    assert "Traceback" not in end.value.code and len(end.value.code) < 600
