"""The recipe of retraining: optimiser, schedule, and the order of examples."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmin.runtime.errors import DminError


@dataclass(frozen=True)
class Recipe:
    """How each model is trained: AdamW with warm-up and cosine decay, as in ``dmin.train.train``.

    Args:
        steps: optimiser steps, whatever the number of examples.
        batch_size: examples per step.
        learning_rate: reached after ``warmup`` steps, then decayed to zero by a cosine.
        warmup: steps of linear warm-up.
        ema_decay: the weights returned are an exponential moving average.

    Raises:
        DminError: a value is out of range.
    """

    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup: int = 100
    ema_decay: float = 0.995

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.steps < 1 or self.batch_size < 1 or not 0 <= self.ema_decay < 1:
            raise DminError(
                f"steps={self.steps}, batch_size={self.batch_size}, ema_decay={self.ema_decay}: "
                f"at least one step and example, and a decay in [0, 1), are needed."
            )

    def rate(self, step: int) -> float:
        """Return the factor on the learning rate at a step: linear warm-up, then cosine decay."""
        if step < self.warmup:
            return 1e-3 + (1 - 1e-3) * step / max(1, self.warmup)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + float(np.cos(np.pi * done)))

    def order(self, subset: np.ndarray, seed: int) -> Tensor:
        """Return the examples of each step, ``[steps, batch]``: one permutation after another.

        A batch larger than the subset has several permutations.
        """
        if not len(subset):
            raise DminError("a subset without examples cannot be trained on.")
        generator = torch.Generator().manual_seed(seed)
        needed, drawn = self.steps * self.batch_size, []
        while needed > 0:
            places = torch.randperm(len(subset), generator=generator)
            drawn.append(places[: len(places) - len(places) % self.batch_size or None])
            needed -= len(drawn[-1])
        places = torch.cat(drawn)[: self.steps * self.batch_size]
        return torch.from_numpy(subset)[places].view(self.steps, self.batch_size)
