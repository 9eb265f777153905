"""From each trainer's run to a ranking: ``dmin doctor``, ``collect`` and ``retrieve run=PATH``."""

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
from runs.tiny import images, picture
from safetensors.torch import save_file

KOHYA = {
    "run.toml": {
        "pretrained_model_name_or_path": "base/sd", "network_module": "networks.lora",
        "dataset_config": "data.toml", "output_dir": "out", "output_name": "mug",
        "min_snr_gamma": 5.0, "v_parameterization": False, "max_train_epochs": 3,
    },
    "data.toml": {
        "general": {"caption_extension": ".txt", "resolution": 32},
        "datasets": [{"subsets": [{"image_dir": "img/mugs", "num_repeats": 3}]}],
    },
}  # fmt: skip
# Trainer → family, its base model in the run, where its adapter is, and how names in it begin.
WHERE = {
    "onetrainer": ("stable_diffusion", "sd", "out/mug", "unet"),
    "ai_toolkit": ("flux", "flux", "out/mug/mug", "transformer"),
    "simple_tuner": ("flux", "flux", "out/pytorch_lora_weights", "transformer"),
    "diffusion_pipe": ("stable_diffusion_xl", "sdxl", "runs/one/epoch2/lora", "unet"),
}
FEW = (
    *("timesteps.values=[100]", "timesteps=explicit", "sketch.dim=256"),
    *("trainer.accelerator=cpu", "extras.print_config=false"),
)
QUERY = ("img/plain/e.png", "--prompt", "a mug", "retrieve.k=1")


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


def placed(base, family, part, *files):
    """Write the files of a run around a tiny base model, with adapters that were trained on it."""
    images()
    for more in "fgh":  # of one shape, as `doctor` compares
        picture(f"img/mugs/{more}.png", (40, 40))
    for each in Path("img").rglob("*.[pJ]*"):
        each.with_suffix(".txt").write_text("a mug")
    shutil.rmtree(f"base/{base}")
    Path(f"base/{base}").symlink_to(checkpoint(family))
    for file in files:
        trained(family, part, file)


def answer():
    """Return the one ranking that was written, and its first example."""
    (file,) = Path("outputs").rglob("ranking.json")
    ranking = json.loads(file.read_text())["rankings"][0]
    return ranking, ranking["queries"][0]["examples"][0]


@pytest.mark.parametrize("name", WHERE)
def test_a_run_is_examined_collected_and_asked(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family, base, file, part = WHERE[name]
    placed(base, family, part, file)
    files = copy.deepcopy(RUNS[name][0])
    if name == "onetrainer":
        files["run.json"]["resolution"] = "64"
    run = f"run={written(files)}"
    assert "diagnosis.json" in dmin("doctor", run, *FEW, cwd=tmp_path).stdout
    store = ["./store"] if name == "onetrainer" else []
    more = ["run.draws=2"] if name == "onetrainer" else []
    told = dmin("collect", *store, run, *FEW, *more, "--limit=2", cwd=tmp_path).stdout
    assert "run: " in told and "taken" in told and ("here 2 draws" in told) == bool(more)
    dmin("retrieve", *(store or (run, *FEW, "--limit=2")), *QUERY, cwd=tmp_path)
    assert answer()[1]["metadata"]["caption"]


def test_a_run_of_kohyas_with_its_checkpoints_is_asked_by_tracin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    placed("sd", "stable_diffusion", "unet", "out/mug-000001", "out/mug")
    run = f"run={written(KOHYA)}"
    assert "diagnosis.json" in dmin("doctor", run, *FEW, cwd=tmp_path).stdout
    line = [run, *FEW, "--limit=2"]
    dmin("collect", *line, cwd=tmp_path)
    asked = ["retrieve", *line, "method=tracin", *QUERY]
    refused = dmin(*asked, cwd=tmp_path, ok=False).stderr
    assert "the same settings and model.adapter=out/mug-000001.safetensors first" in refused
    files = "model.adapter=out/mug-000001.safetensors,out/mug.safetensors"
    dmin("collect", "-m", *line, files, cwd=tmp_path)
    assert "learning rates = 0.667, 0.333" in dmin(*asked, cwd=tmp_path).stdout
    assert answer()[0]["method"] == "tracin"
