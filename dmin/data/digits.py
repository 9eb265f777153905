"""scikit-learn's 1,797 real handwritten digits: data for the demo that needs no download."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits

from dmin.data.base import Example, Examples


class Digits(Examples):
    """Handwritten digits of 8 × 8 pixels, 10 classes (Alpaydin & Kaynak 1998, UCI).

    Args:
        split: ``train`` (1,500), ``heldout`` (297) or ``all``; the two are disjoint and drawn once
            with a fixed seed, so a digit keeps its id and its split for ever.
    """

    TRAIN = 1500

    def __init__(self, split: Literal["train", "heldout", "all"] = "train") -> None:
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(images))
        parts = {"train": order[: self.TRAIN], "heldout": order[self.TRAIN :], "all": order}
        super().__init__(
            [
                Example(
                    id=f"digit-{index:04d}",
                    image=torch.from_numpy(images[index].reshape(1, 8, 8) / 16).float(),
                    label=int(labels[index]),
                )
                for index in sorted(parts[split])
            ]
        )
