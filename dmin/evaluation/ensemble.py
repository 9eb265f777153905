"""Training many small models at once: what ground truth by retraining is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from dmin.data.base import Dataset, collate, describe_dataset
from dmin.errors import DminError
from dmin.fingerprint import array_digest, fingerprint
from dmin.models.base import Condition, DiffusionModel, per_example_loss
from dmin.noise import Noise

Stacked = dict[str, Tensor]
"""The parameters of several models by name, ``[models, *shape]``."""


@dataclass(frozen=True)
class Recipe:
    """How each model is trained: AdamW with warm-up and cosine, as ``dmin.train.train`` does.

    Args:
        steps: optimiser steps, whatever the number of examples.
        batch_size: examples a step.
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
        """Refuse what cannot be trained."""
        if self.steps < 1 or self.batch_size < 1 or not 0 <= self.ema_decay < 1:
            raise DminError(
                f"steps={self.steps}, batch_size={self.batch_size}, ema_decay={self.ema_decay}: "
                f"at least one step and example, and a decay in [0, 1), are needed."
            )


class Ensemble:
    """Trains models of one kind on subsets of one dataset, and keeps them on disk.

    Models of one seed start from the same weights and see the same noise and timesteps at each
    step, so they differ by their data alone; what is left to chance differs between seeds.

    Args:
        model: builds an untrained model; torch's generator is seeded before each call.
        dataset: all training examples; read once, and held in memory.
        recipe: how to train.
        cache: folder for the trained weights, one file a chunk under a fingerprint of all it
            depends on, so that a run that was killed goes on where it stopped; None keeps none.
        chunk: models trained together.
    """

    def __init__(
        self,
        model: Callable[[], DiffusionModel],
        dataset: Dataset,
        recipe: Recipe | None = None,
        cache: str | Path | None = None,
        chunk: int = 64,
    ) -> None:
        self.model = model
        self.recipe = recipe or Recipe()
        self.cache = None if cache is None else Path(cache)
        self.chunk = chunk
        self.template = model().requires_grad_(False)
        self.examples = encoded(self.template, dataset)
        self.dataset = describe_dataset(dataset)

    def train(
        self,
        subsets: Sequence[np.ndarray],
        seed: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Stacked:
        """Return a trained model for each subset.

        Args:
            subsets: positions in the dataset, an array a model, of any lengths.
            seed: of weights, order, timesteps and noise.
            progress: told how many models are trained, of how many.

        Raises:
            DminError: a subset is empty, or a model's loss became NaN.
        """
        parts = []
        for start in range(0, len(subsets), self.chunk):
            parts.append(self._chunk([np.asarray(s) for s in subsets[start:][: self.chunk]], seed))
            progress(min(start + self.chunk, len(subsets)), len(subsets))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def losses(
        self, models: Stacked, dataset: Dataset, timesteps: Sequence[float], noise: Noise
    ) -> np.ndarray:
        """Return each model's loss of each example, mean over timesteps and draws.

        Args:
            models: from :meth:`train`.
            dataset: examples, such as queries; all see the same noise.
            timesteps: of the model's ladder.
            noise: shared by models and examples.

        Returns:
            float64 ``[models, examples]``.
        """
        x0, condition = encoded(self.template, dataset)
        loss = vmap(self._call, in_dims=(0, None, None, None, None))
        total = torch.zeros(len(next(iter(models.values()))), len(x0), dtype=torch.float64)
        points = [(t, draw) for t in timesteps for draw in range(noise.draws)]
        with torch.no_grad():
            for t, draw in points:
                e = noise(x0.shape[1:], t, draw).expand_as(x0)
                total += loss(models, x0, e, torch.full((len(x0),), float(t)), condition)
        return (total / len(points)).numpy()

    def load(self, models: Stacked, index: int) -> DiffusionModel:
        """Return one of the models as a model of its own, in eval mode."""
        model = self.model()
        model.network.load_state_dict({name: values[index] for name, values in models.items()})
        return model.eval()

    def _chunk(self, subsets: list[np.ndarray], seed: int) -> Stacked:
        if self.cache is None:
            return self._train(subsets, seed)
        path = self.cache / f"ensemble-{self._fingerprint(subsets, seed)}.safetensors"
        if path.is_file():
            return load_file(path)
        trained = self._train(subsets, seed)
        self.cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        save_file(trained, partial)
        partial.replace(path)
        return trained

    def _fingerprint(self, subsets: list[np.ndarray], seed: int) -> str:
        shapes = {n: list(p.shape) for n, p in self.template.network.named_parameters()}
        made_of = {
            "recipe": asdict(self.recipe),
            "model": self.template.describe(),
            "network": [str(self.template.network), shapes],
            "dataset": self.dataset,
            "subsets": array_digest(*(s.astype(np.int64) for s in subsets)),
            "seed": seed,
        }
        return fingerprint(made_of)

    def _train(self, subsets: list[np.ndarray], seed: int) -> Stacked:
        recipe = self.recipe
        models = self._start(len(subsets), seed)
        averages = {name: values.detach().clone() for name, values in models.items()}
        optimizer = torch.optim.AdamW(
            models.values(), lr=recipe.learning_rate, weight_decay=0.0, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        x0, condition = self.examples
        loss = vmap(self._call, in_dims=(0, 0, None, None, 0))
        orders = [_order(subset, recipe, seed) for subset in subsets]
        generator = torch.Generator().manual_seed(seed)
        ladder = torch.tensor(list(self.template.ladder))
        for step in range(recipe.steps):
            chosen = torch.stack([order[step] for order in orders])  # [models, batch]
            noise = torch.randn(chosen.shape[1], *x0.shape[1:], generator=generator)
            drawn = torch.randint(len(ladder), (chosen.shape[1],), generator=generator)
            labels = {name: values[chosen] for name, values in condition.items()}
            losses = loss(models, x0[chosen], noise, ladder[drawn], labels).mean(1)
            if step % 100 == 0 and not torch.isfinite(losses).all():
                raise DminError(
                    f"the loss of a model became NaN by step {step}. Lower learning_rate (now "
                    f"{recipe.learning_rate:g})."
                )
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()  # each model's gradient is its own: the sum mixes none
            optimizer.step()
            schedule.step()
            with torch.no_grad():  # the average starts from the weights after the first step
                weight = 1 - recipe.ema_decay if step else 1.0
                torch._foreach_lerp_(list(averages.values()), list(models.values()), weight)
        return averages

    def _start(self, count: int, seed: int) -> Stacked:
        """Return untrained weights, the same for each model, as leaves that take gradients."""
        torch.manual_seed(seed)
        network = self.model().network
        stacked, _ = stack_module_state([network])
        return {
            name: values.detach().expand(count, *values.shape[1:]).clone().requires_grad_()
            for name, values in stacked.items()
        }

    def _rate(self, step: int) -> float:
        """Warm up linearly, then decay by a cosine, as a share of the learning rate."""
        warmup, steps = self.recipe.warmup, self.recipe.steps
        if step < warmup:
            return 1e-3 + (1 - 1e-3) * step / max(1, warmup)
        return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))

    def _call(
        self, weights: Stacked, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition
    ) -> Tensor:
        """Return one model's loss of each example: :func:`vmap` makes it that of all models."""
        module = _Loss(self.template)
        named = {f"model.network.{name}": values for name, values in weights.items()}
        found: Tensor = functional_call(module, named, (x0, noise, t, condition))
        return found


class _Loss(nn.Module):
    """A model's loss as a module's call, which is what torch can call with other weights."""

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return per_example_loss(self.model.predict(x0, noise, t, condition))


def encoded(model: DiffusionModel, dataset: Dataset) -> tuple[Tensor, Condition]:
    """Return a whole dataset as a model takes it."""
    batch: Mapping[str, Any] = collate([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():
        return model.encode(batch)


def _order(subset: np.ndarray, recipe: Recipe, seed: int) -> Tensor:
    """Return the examples of each step, ``[steps, batch]``: fresh permutations, one after another.

    A subset smaller than a batch is gone through as often as a batch needs.
    """
    if not len(subset):
        raise DminError("a subset of no examples cannot be trained on.")
    generator = torch.Generator().manual_seed(seed)
    needed, drawn = recipe.steps * recipe.batch_size, []
    while needed > 0:
        order = torch.randperm(len(subset), generator=generator)
        drawn.append(order[: len(order) - len(order) % recipe.batch_size or None])
        needed -= len(drawn[-1])
    places = torch.cat(drawn)[: recipe.steps * recipe.batch_size]
    return torch.from_numpy(subset)[places].view(recipe.steps, recipe.batch_size)
