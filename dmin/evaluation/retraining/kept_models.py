"""Cache of retrained models on disk: their weights, and their losses on some queries."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save
from torch import Tensor

from dmin.runtime.files import commit
from dmin.runtime.fingerprint import array_digest


def model_key(subset: np.ndarray, seed: int) -> str:
    """Return the key of the model trained on a subset with a seed."""
    return f"{array_digest(np.asarray(subset).astype(np.int64))}-{seed}"


class Weights:
    """Trained weights, one file per model.

    Args:
        folder: of the files, made when the first is written; None: nothing is written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def found(self, key: str) -> dict[str, Tensor] | None:
        """Return a model's weights by name; None if there is no file."""
        path = None if self.folder is None else self.folder / f"{key}.safetensors"
        return load_file(path) if path is not None and path.is_file() else None

    def keep(self, key: str, model: dict[str, Tensor]) -> None:
        """Write a model's weights atomically."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        commit(self.folder / f"{key}.safetensors", save(model), durable=False)


class Outcomes:
    """Losses of trained models on some queries, by the models' keys, one line each in a file.

    Args:
        path: of the file; None: only in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, np.ndarray] = {}
        if self.path is not None and self.path.is_file():
            # A line without its end was cut off by a kill, and is not read.
            for line in self.path.read_text().splitlines(keepends=True):
                if line.endswith("}\n"):
                    row = json.loads(line)
                    self.rows[row["model"]] = np.array(row["losses"])

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> np.ndarray:
        return self.rows[key]

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """Add the losses ``[Q]`` of more models."""
        self.rows |= rows
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                # The previous line may have been cut off.
                file.write("\n" if file.tell() else "")
                for key, losses in rows.items():
                    file.write(json.dumps({"model": key, "losses": losses.tolist()}) + "\n")
