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


def header_only(name, tensors=(), **metadata):
    """Write a safetensors file with empty tensors of these names."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {"__metadata__": metadata, **dict.fromkeys(tensors, entry)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
