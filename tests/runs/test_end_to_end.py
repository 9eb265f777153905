"""From a trainer's run to a ranking: ``dmin collect run=PATH``, then ``dmin retrieve``."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import dmin
from models.families import checkpoint
from models.tiny import BUILDERS
from runs.test_trainers import RUNS, written
from runs.tiny import images
from safetensors.torch import save_file

# Trainer → family, where its adapter is, and how names in it begin.
WHERE = {
    "onetrainer": ("stable_diffusion", "out/mug", "unet"),
    "ai_toolkit": ("flux", "out/mug/mug", "transformer"),
}
FEW = (
    "timesteps.values=[100]",
    "timesteps=explicit",
    "sketch.dim=256",
    "trainer.accelerator=cpu",
    "--limit=2",
)


def trained(family, part, file):
    """Save an adapter of the queries of a family's network."""
    network = getattr(BUILDERS[family](), part)
    layers = [name for name, _ in network.named_modules() if name.endswith("to_q")]
    state = {}
    for name in layers:
        out, into = network.get_submodule(name).weight.shape
        state[f"{part}.{name}.lora_A.weight"] = torch.randn(8, into)
        state[f"{part}.{name}.lora_B.weight"] = torch.randn(out, 8)
    save_file(state, f"{file}.safetensors")


@pytest.mark.parametrize("name", WHERE)
def test_a_run_is_collected_and_asked(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images()
    family, file, part = WHERE[name]
    base = Path("base/sd" if family == "stable_diffusion" else "base/flux")
    shutil.rmtree(base)
    base.symlink_to(checkpoint(family))
    trained(family, part, file)
    for each in Path("img").rglob("*.[pJ]*"):
        each.with_suffix(".txt").write_text("a mug")
    files = copy.deepcopy(RUNS[name][0])
    if name == "onetrainer":
        files["run.json"]["resolution"] = "64"
    run = written(files)
    told = dmin("collect", f"run={run}", "./store", *FEW, cwd=tmp_path).stdout
    assert "run: " in told and "taken" in told
    dmin(
        "retrieve", "./store", "img/plain/e.png", "--prompt", "a mug", "retrieve.k=1", cwd=tmp_path
    )
    (ranking,) = Path("outputs").rglob("ranking.json")
    (query,) = json.loads(ranking.read_text())["rankings"][0]["queries"]
    assert query["examples"][0]["metadata"]["caption"]
