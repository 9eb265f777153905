"""Commands and their settings, as they were: what is run, recorded and composed."""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from golden.definitions import DATA
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

# All that is not of the public face of the package stands here.
from dmin.cli import main
from dmin.cli.config.groups import config_directory, groups
from dmin.cli.config.renamed import current  # noqa: F401
from dmin.cli.config.subtrees import reads  # noqa: F401

CFG, RECORDS = DATA / "cfg", DATA / "records"
SETTINGS, DIGESTS = DATA / "settings_0_1_0.json", DATA / "digests.json"

COMPOSED = ("train", "doctor", "collect", "sample", "retrieve", "outliers", "evaluate", "demo")
ASKED = {"default": ["model=ddpm", "data=digits"], "digits": ["experiment=digits"]}

_SMALL = [
    *("experiment=digits", "debug=fast", "name=golden", "model=mlp", "train=digits_mlp"),
    *("data.split=heldout", "extras.threads=1", "sketch.dim=64", "sketch.block=16"),
]
_QUERIES = ["queries.prompts=[0,1]", "queries.per_prompt=1", "queries.steps=2"]
RUNS = {
    "train": _SMALL,
    "collect": _SMALL,
    "doctor": [*_SMALL, "doctor.examples=4"],
    "sample": [*_SMALL, *_QUERIES],
    "retrieve": [*_SMALL, *_QUERIES, "retrieve.k=3"],
    "outliers": [*_SMALL, "method=grad_dot", "outliers.k=4"],
    "evaluate": [
        *_SMALL,
        *("~benchmark.tasks.generated_digits", "~benchmark.tasks.heldout_digits"),
        *("~benchmark.tasks.noisy_copies", "benchmark.tasks.exact_copies.queries.count=3"),
        "benchmark.methods=[random,pixel_l2,dmin]",
    ],
}
"""Each finds in its folder what the first two leave."""

# What a choice cannot know by itself.
_VALUES = {
    ("data", "image_folder"): ["data.root=images"],
    ("data", "hf_dataset"): ["data.path=table"],
    ("data", "webdataset"): ["data.shards=shards"],
    ("data", "subset"): ["data@data.dataset=digits", "data.count=2"],
    ("queries", "images"): ["queries.root=images"],
    ("benchmark", "dmin_paper"): ["queries.root=images"],
    ("queries", "generated"): ["queries.prompts=[0,1]"],
    ("method", "encoder"): ["method.path=clip"],
    ("timesteps", "explicit"): ["timesteps.values=[500]"],
    ("shard", "slurm_array"): ["shard.id=3", "shard.num=4"],
    ("shard", "slurm_task"): ["shard.id=3", "shard.num=4"],
}


def dmin(*arguments: str, place: Path) -> tuple[int, str]:
    """Run a command in a folder, in this process; return its status and what it printed."""
    before, printed = list(sys.argv), io.StringIO()
    here, path = Path.cwd(), list(sys.path)
    os.chdir(place)
    sys.argv = ["dmin", *arguments]
    try:
        with contextlib.redirect_stdout(printed):
            status = main(list(arguments))
    finally:
        os.chdir(here)
        sys.argv, sys.path[:] = before, path
    return status, printed.getvalue()


def shown(command: str, asked: list[str], place: Path) -> str:
    """Return what ``dmin <command> … --cfg job`` prints."""
    return dmin(command, *asked, "--cfg", "job", place=place)[1]


def choices() -> list[tuple[str, str]]:
    """Return every choice of every configuration group but Hydra's."""
    found = groups().items()
    return [(group, name) for group, names in found if group.split("/")[0] != "hydra"
            for name in names]  # fmt: skip


def overrides(group: str, name: str) -> list[str]:
    """Return what asks for a choice, and for what it cannot do without."""
    of_captions = name in ("captioned", "lora")
    needed = {"model": "stable_diffusion_3" if of_captions else "ddpm", "data": "digits"}
    if of_captions or "shapes" in name:
        needed["data"] = "shapes"
    if group == "experiment":
        asked = [f"experiment={name}"]
    elif group == "debug":
        asked = ["experiment=digits", f"debug={name}"]
    else:
        asked = [f"{key}={value}" for key, value in {**needed, group: name}.items()]
    return [*asked, *_VALUES.get((group, name), [])]


def composed(group: str, name: str) -> dict[str, Any]:
    """Return the configuration that a choice makes, by dotted names."""
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        found = compose("dmin", overrides(group, name))
    return flat(OmegaConf.to_container(found, resolve=False))


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names."""
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    found = {}
    for key, value in node.items():
        found.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return found


def names(group: str, name: str, plain: set[str]) -> list[str]:
    """Return the names of settings under a choice's group, and others that it brings."""
    found = composed(group, name)
    return sorted(key for key in found if key.startswith(f"{group}.") or key not in plain)


def targets() -> list[str]:
    """Return every ``_target_`` in the YAML files."""
    found: set[str] = set()

    def look(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("_target_"), str):
                found.add(node["_target_"])
            node = list(node.values())
        if isinstance(node, list):
            for each in node:
                look(each)

    for file in config_directory().rglob("*.yaml"):
        look(yaml.safe_load(file.read_text()))
    return sorted(found)
