"""Files of a checkpoint, an adapter, an encoder or a table that bring code: none of it runs."""

import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPConfig

from dmin.attribution import EncoderCosine
from dmin.data.huggingface import HFDataset
from dmin.models.adapters import load_adapters
from dmin.models.families.ddpm import DDPM
from dmin.runtime.errors import DminError

EVIL = "import os\nos.makedirs('ran')\nclass Evil:\n    pass\n"


class Ran:
    """Leaves a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture
def place(ddpm_path, tmp_path, monkeypatch):
    """A copy of a checkpoint in a working folder that is on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_library.py").write_text(EVIL)
    yield shutil.copytree(ddpm_path, tmp_path / "model")
    assert not (tmp_path / "ran").exists() and "evil_library" not in sys.modules


def index(place, **entries):
    file = place / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"unet": ["evil", "Evil"]}, "unet"),
        ({"scheduler": ["evil", "Evil"]}, "scheduler"),
        ({"more": ["evil_library", "Evil"]}, "more"),
        ({"more": ["os", "mkdir"]}, "more"),
        ({"more": ["diffusers.loaders", "Evil"]}, "more"),
        ({"more": [["evil"], "Evil"]}, "more"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "unet"),
        ({"_class_name": ["evil", "Evil"]}, "_class_name"),
    ],
)
def test_code_that_model_index_names_is_refused(entries, named, place):
    for folder in (place, place / "unet", place / "scheduler"):
        (folder / "evil.py").write_text(EVIL)
    if entries == {"unet": ["diffusers", "UNet2DModel"]}:
        (place / "unet/diffusers.py").write_text(EVIL)
    index(place, **entries)
    said = "a Evil, but" if named == "_class_name" else f"{named} needs code of"
    with pytest.raises(DminError, match=said):
        DDPM.from_pretrained(place)


def test_weights_that_are_a_pickle_of_more_than_tensors_are_refused(place):
    for file in (place / "unet").glob("*.safetensors"):
        file.unlink()
    (place / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Ran()))
    with pytest.raises(DminError, match=r"model\.path"):
        DDPM.from_pretrained(place)


def test_an_adapter_names_no_module(place, tmp_path):
    """Peft would import what megatron_core names."""
    config = LoraConfig(r=2, target_modules=["0"])
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora/adapter_config.json"
    known = json.loads(file.read_text())
    code = {"megatron_core": "evil_library", "megatron_config": {"a": 1}}
    file.write_text(json.dumps({**known, **code}))
    load_adapters(nn.Sequential(nn.Linear(4, 4)), tmp_path / "lora")
    assert "evil_library" not in sys.modules and "peft.tuners.megatron" not in sys.modules


def test_an_encoder_brings_no_code(place, tmp_path):
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "evil.py").write_text(EVIL)
    known = CLIPConfig().to_dict() | {"model_type": "evil"}
    auto = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (encoder / "config.json").write_text(json.dumps({**known, "auto_map": auto}))
    with pytest.raises(DminError, match=r"method\.path"):
        EncoderCosine(str(encoder)).fit(None)


@pytest.mark.parametrize("kind", ["pandas", "pickle", "pkl", "pt", "npy", "text", "webdataset"])
def test_a_table_is_no_pickle(kind, place, tmp_path):
    pytest.importorskip("datasets")
    np.save(tmp_path / "x.npy", [Ran()], allow_pickle=True)
    (tmp_path / f"x.{kind}").write_bytes(pickle.dumps(Ran()))
    with pytest.raises(DminError, match="only these files are read: parquet, arrow, csv, json"):
        HFDataset(tmp_path / f"x.{kind}")
    with pytest.raises(DminError, match="cannot be loaded"):
        HFDataset("pandas")
