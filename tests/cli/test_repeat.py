"""What `dmin repeat --dry` says of data, weights and queries that are not those of a record."""

import json
import shutil

import pytest
import torch
from examples_on_disk import encoded
from golden.settings import dmin
from PIL import Image

from dmin.models.families.ddpm import DDPM

FEW = ["sketch=block_cyclic", "timesteps.num=2", "trainer=cpu", "extras.threads=1", "-q"]


@pytest.fixture(scope="module")
def place(ddpm_path, tmp_path_factory):
    """A folder in which examples were collected and a picture was asked about."""
    place = tmp_path_factory.mktemp("dry")
    shutil.copytree(ddpm_path, place / "model")
    (place / "images").mkdir()
    rows = [{"file_name": f"{n}.png", "label": n} for n in range(4)]
    for n in range(4):
        paint(place / f"images/{n}.png", 20 * n)
    paint(place / "asked.png", 21)
    (place / "images/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["model=ddpm", "model.path=model", "data=image_folder", "data.root=images"]
    assert dmin("collect", "store", *data, "data.mode=L", "data.size=8", *FEW, place=place)[0] == 0
    asked = ["store", "asked.png", "--prompt", "3", "retrieve.k=2", "trainer=cpu", "-q"]
    assert dmin("retrieve", *asked, place=place)[0] == 0
    return place


def paint(path, shade):
    path.write_bytes(encoded(Image.new("L", (8, 8), shade), "PNG"))


def dry(place, command):
    (folder,) = place.glob(f"outputs/runs/{command}/*")
    before = sorted(place.rglob("*"))
    status, said = dmin("repeat", str(folder), "--dry", place=place)
    assert status == 0 and sorted(place.rglob("*")) == before
    return said.partition("data and weights:\n")[2].partition("\nneeds --trust")[0]


def test_data_weights_and_queries_are_compared(place):
    assert dry(place, "collect") == "  the same as then (data, weights)"
    assert dry(place, "retrieve") == "  the same as then (queries, data, weights)"
    paint(place / "asked.png", 90)
    assert dry(place, "retrieve").startswith("  queries.")
    paint(place / "images/2.png", 41)
    said = dry(place, "collect")
    assert said.startswith("  data.content: ") and said.endswith(" then") and "weights" not in said
    paint(place / "images/2.png", 40)
    model = DDPM.from_pretrained(place / "model")
    with torch.no_grad():
        next(model.network.parameters()).add_(1)
    shutil.rmtree(place / "model")
    model.save_pretrained(place / "model")
    assert dry(place, "collect").startswith("  weights.network: ")
    shutil.rmtree(place / "model")
    assert dry(place, "collect").startswith("  not compared: ")
