"""Before a run stands what differs from the defaults, and nothing else."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console

from dmin.cli.config.groups import config_directory
from dmin.cli.config.subtrees import needed, prune
from dmin.cli.config.tree import settings_tree
from dmin.cli.config.validate import validate


def test_it_shows_what_is_not_at_its_default():
    asked = ["data=digits", "data.split=heldout", "model=ddpm", "model.path=here", "name=x"]
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        cfg = compose("dmin", [*asked, "collect.dtype=int8", "method=spectral", "method.alpha=2"])
    validate(prune(cfg, "outliers"), needed("outliers"))
    console = Console(width=100)
    with console.capture() as shown:
        console.print(settings_tree("outliers", cfg, Path("run/config.yaml")))
    lines = [line.lstrip("├└─ ") for line in shown.get().splitlines()]
    assert [each for each in lines if not each.startswith(("trainer", "│", "shard"))] == [
        "dmin outliers",
        "name: x",
        "seed: 0",
        "collect: dtype=int8",
        "model: DDPM.from_pretrained(path=here)",
        "data: Digits(split=heldout)",
        "sketch: Auto()",
        "timesteps: Stratified()",
        "noise: SharedNoise()",
        "method: Spectral(alpha=2)",
        "all settings: run/config.yaml",
    ]
