"""Files of which a run is made, as small as they can be: nothing of them is loaded."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(name, size=(40, 32)):
    """Write a picture below the folder at hand."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(map(ord, name))
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype("uint8")
    Image.fromarray(pixels).save(path, format="PNG")


def pipeline_index(folder, name):
    """Write what a saved pipeline is recognised by."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "model_index.json").write_text(json.dumps({"_class_name": name}))


def predicts(folder, kind):
    """Write what a saved pipeline's scheduler says that the network predicts."""
    Path(folder, "scheduler").mkdir(parents=True, exist_ok=True)
    Path(folder, "scheduler/scheduler_config.json").write_text(
        json.dumps({"prediction_type": kind})
    )


def header_only(name, tensors=(), **metadata):
    """Write a safetensors file with empty tensors of these names."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {"__metadata__": metadata, **dict.fromkeys(tensors, entry)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def images():
    """Write the images and captions on which trainers differ, base models and adapters."""
    for name, kind in BASES.items():
        pipeline_index(f"base/{name}", f"{kind}Pipeline")
    picture("img/mugs/a.png", (80, 40))
    for name in ("b.JPG", "c.png", "deep/d.png", "a-masklabel.png", "_controls/a.png"):
        picture(f"img/mugs/{name}", (80, 40) if name.endswith("a-masklabel.png") else (40, 40))
    picture("img/mugs_mask/a.png", (80, 40))
    picture("img/plain/e.png")
    for name, text in (("a.txt", "a mug, red\na second line"), ("c.TXT", ""), ("deep/d.txt", "d")):
        Path("img/mugs", name).write_text(text)
    for name in ("out/mug", "out/mug/mug", "out/pytorch_lora_weights", "runs/one/epoch2/lora"):
        header_only(f"{name}.safetensors")


BASES = {"sd": "StableDiffusion", "flux": "Flux", "sdxl": "StableDiffusionXL"}
