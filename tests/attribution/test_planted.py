"""Faults planted among training images: a wrong caption, and one odd picture that stands twice."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import dmin
from PIL import Image
from torch import nn

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 40)}
FEW = (
    *("--config-dir", "conf", "model=planted", "data=image_folder", "data.root=pictures"),
    *("timesteps=explicit", "timesteps.values=[900,700,500,300,100]", "noise.draws=4"),
    *("sketch.dim=512", "trainer.accelerator=cpu"),
)
MODEL = """
from pathlib import Path

import torch

from attribution.test_planted import network, velocity
from dmin import DiffusionModel, Prediction


class Planted(DiffusionModel):
    timesteps = range(999, 0, -1)

    def __init__(self):
        super().__init__()
        self.network = network()
        self.network.load_state_dict(torch.load("weights.pt"))

    def encode(self, batch):
        letters = [[text.count(letter) for letter in "bdegorlnu"] for text in batch["caption"]]
        return batch["image"] * 2 - 1, {"text": torch.tensor(letters).float()}

    def predict(self, x0, noise, t, condition):
        found = velocity(self.network, x0, noise, t / 1000, condition["text"])
        return Prediction(*found, torch.ones(len(x0)))
"""


def network():
    """Return what predicts the velocity of 12 numbers, told 9 of the caption and the time."""
    return nn.Sequential(nn.Linear(12 + 9 + 1, 64), nn.SiLU(), nn.Linear(64, 12))


def velocity(net, x0, noise, t, text):
    """Return the velocity that is predicted on the line to the noise, and the true one."""
    t, x0, noise = t.view(-1, 1), x0.flatten(1), noise.flatten(1)
    return net(torch.cat([(1 - t) * x0 + t * noise, text, t], 1)), noise - x0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of pictures with their captions, and a model that was trained on them."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    found = {
        f"{name}{n}": (name, np.array(colour) + rng.normal(0, 20, (2, 2, 3)))
        for name, colour in COLOURS.items()
        for n in range(8)
    }
    found["blue4"] = ("red", found["blue4"][1])
    found |= dict.fromkeys(("odd0", "odd1"), ("green", 255 * rng.integers(0, 2, (2, 2, 3))))
    (folder / "pictures").mkdir()
    lines = []
    for id, (caption, pixels) in found.items():
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / f"pictures/{id}.png")
        lines.append(json.dumps({"file_name": f"{id}.png", "text": caption}))
    (folder / "pictures/metadata.jsonl").write_text("\n".join(lines))
    (folder / "conf/model").mkdir(parents=True)
    (folder / "conf/model/planted.yaml").write_text("_target_: planted_model.Planted\n")
    (folder / "planted_model.py").write_text(MODEL)
    torch.save(trained(list(found.values())).state_dict(), folder / "weights.pt")
    return folder


def trained(pairs):
    """Return a network trained on captions and pixels."""
    torch.manual_seed(0)
    x0 = torch.tensor(np.stack([pixels for _, pixels in pairs])).float() / 127.5 - 1
    x0 = x0.clamp(-1, 1).permute(0, 3, 1, 2)
    text = torch.tensor([[t.count(letter) for letter in "bdegorlnu"] for t, _ in pairs]).float()
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(400):
        output, target = velocity(net, x0, torch.randn_like(x0), torch.rand(len(x0)), text)
        optimizer.zero_grad()
        (output - target).square().mean().backward()
        optimizer.step()
    return net


def test_planted_faults_are_the_first_by_loss_and_by_self_influence(place):
    dmin("collect", *FEW, cwd=place)
    for command, column in (("losses", "relative"), ("outliers", "score")):
        dmin(command, *FEW, cwd=place)
        (file,) = Path(place).rglob(f"{command}.csv")
        rows = list(csv.DictReader(file.open()))
        assert rows[0]["id"] == "blue4.png"
        assert {row["id"] for row in rows[1:3]} == {"odd0.png", "odd1.png"}
        assert rows[1][column] == rows[2][column]  # one picture, the same noise
        assert float(rows[2][column]) > 1.2 * float(rows[3][column])
