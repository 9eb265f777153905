"""Training many small models at once: what ground truth by retraining is made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from dmin.data.base import Dataset, collate, describe_dataset
from dmin.errors import DminError
from dmin.evaluation.film_training import can_train, train_films
from dmin.fingerprint import array_digest, fingerprint
from dmin.models.base import Condition, DiffusionModel, per_example_loss
from dmin.noise import Noise

Stacked = dict[str, Tensor]
"""The parameters of several models by name, ``[models, *shape]``."""

Progress = Callable[[int, int], None]
"""Told how much is done, of how much."""


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

    What was trained is found again by its subset and seed, whatever else is asked for in the same
    call: to measure one method more costs the models of that method.

    Args:
        model: builds an untrained model; torch's generator is seeded before each call.
        dataset: all training examples; read once, and held in memory.
        recipe: how to train.
        cache: folder for trained weights and their losses, under a fingerprint of all they depend
            on, so that a run that was killed goes on where it stopped; None keeps none.
        chunk: models trained together.
        device: where they are trained.
    """

    def __init__(
        self,
        model: Callable[[], DiffusionModel],
        dataset: Dataset,
        recipe: Recipe | None = None,
        cache: str | Path | None = None,
        chunk: int = 64,
        device: str | torch.device = "cpu",
    ) -> None:
        self.model = model
        self.recipe = recipe or Recipe()
        self.chunk = chunk
        self.device = torch.device(device)
        self.template = _for_vmap(model().requires_grad_(False).to(self.device))
        self.examples = encoded(self.template, dataset, self.device)
        self.dataset = describe_dataset(dataset)
        self._kept: dict[str, Outcomes] = {}
        self.cache = None if cache is None else Path(cache) / f"ensemble-{self._fingerprint()}"

    def train(
        self,
        subsets: Sequence[np.ndarray],
        seed: int,
        progress: Progress = lambda done, total: None,
    ) -> Stacked:
        """Return a trained model for each subset.

        Args:
            subsets: positions in the dataset, an array a model, of any lengths.
            seed: of weights, order, timesteps and noise.
            progress: told how many models there are, of how many.

        Raises:
            DminError: a subset is empty, or a model's loss became NaN.
        """
        parts: dict[str, Stacked] = {}
        for chunk in self._chunks(subsets, seed):
            models = self._models(chunk, seed)
            parts |= {
                key: {name: values[i] for name, values in models.items()}
                for i, key in enumerate(chunk)
            }
            progress(len(parts), len(subsets))
        found = [parts[_key(subset, seed)] for subset in subsets]
        return {name: torch.stack([part[name] for part in found]) for name in found[0]}

    def outcomes(
        self,
        subsets: Sequence[np.ndarray],
        seed: int,
        queries: Dataset,
        timesteps: Sequence[float],
        noise: Noise,
        progress: Progress = lambda done, total: None,
    ) -> np.ndarray:
        """Return what models trained on the subsets lose on queries, float64 ``[models, Q]``.

        As :meth:`train` and :meth:`losses`, but the losses are kept as well.
        """
        kept = self._outcomes([describe_dataset(queries), list(timesteps), noise.describe()])
        keys = [_key(subset, seed) for subset in subsets]
        missing = [s for s, key in zip(subsets, keys, strict=True) if key not in kept]
        done = len(subsets) - len(missing)
        progress(done, len(subsets))
        for chunk in self._chunks(missing, seed):
            losses = self.losses(self._models(chunk, seed), queries, timesteps, noise)
            kept.add(dict(zip(chunk, losses, strict=True)))
            done += sum(_key(s, seed) in chunk for s in missing)
            progress(done, len(subsets))
        return np.stack([kept[key] for key in keys])

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
        x0, condition = encoded(self.template, dataset, self.device)
        models = {name: values.to(self.device) for name, values in models.items()}
        loss = vmap(self._call, in_dims=(0, None, None, None, None))
        total = torch.zeros(len(next(iter(models.values()))), len(x0), dtype=torch.float64)
        points = [(t, draw) for t in timesteps for draw in range(noise.draws)]
        with torch.no_grad():
            for t, draw in points:
                e = noise(x0.shape[1:], t, draw).to(x0).expand_as(x0)
                steps = torch.full((len(x0),), float(t), device=x0.device)
                total += loss(models, x0, e, steps, condition).cpu()
        return (total / len(points)).numpy()

    def load(self, models: Stacked, index: int) -> DiffusionModel:
        """Return one of the models as a model of its own, in eval mode."""
        model = self.model()
        model.network.load_state_dict({name: values[index] for name, values in models.items()})
        return model.eval()

    def _outcomes(self, made_of: list[Any]) -> Outcomes:
        name = f"losses-{fingerprint({'made_of': made_of})}.jsonl"
        if name not in self._kept:
            self._kept[name] = Outcomes(None if self.cache is None else self.cache / name)
        return self._kept[name]

    def _chunks(self, subsets: Sequence[np.ndarray], seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the distinct subsets by key, as many as are trained together."""
        distinct = list({_key(subset, seed): np.asarray(subset) for subset in subsets}.items())
        for start in range(0, len(distinct), self.chunk):
            yield dict(distinct[start : start + self.chunk])

    def _models(self, subsets: dict[str, np.ndarray], seed: int) -> Stacked:
        """Return trained models, from disk where they are there."""
        parts = {key: self._found(key) for key in subsets}
        missing = [key for key, part in parts.items() if part is None]
        if missing:
            trained = self._train([subsets[key] for key in missing], seed)
            for number, key in enumerate(missing):
                one = {n: values[number].cpu().contiguous() for n, values in trained.items()}
                parts[key] = one
                self._keep(key, one)
        names = next(part for part in parts.values() if part is not None)
        return {n: torch.stack([part[n] for part in parts.values() if part]) for n in names}

    def _found(self, key: str) -> Stacked | None:
        path = None if self.cache is None else self.cache / f"{key}.safetensors"
        return load_file(path) if path is not None and path.is_file() else None

    def _keep(self, key: str, model: Stacked) -> None:
        if self.cache is None:
            return
        self.cache.mkdir(parents=True, exist_ok=True)
        partial = self.cache / f"{key}.tmp"
        save_file(model, partial)
        partial.replace(partial.with_suffix(".safetensors"))

    def _fingerprint(self) -> str:
        shapes = {n: list(p.shape) for n, p in self.template.network.named_parameters()}
        made_of = {
            "recipe": asdict(self.recipe),
            "model": self.template.describe(),
            "network": [str(self.template.network), shapes],
            "dataset": self.dataset,
        }
        return fingerprint(made_of)

    def _train(self, subsets: list[np.ndarray], seed: int) -> Stacked:
        orders = [_order(subset, self.recipe, seed) for subset in subsets]
        if can_train(self.template, self.device):
            return self._train_films(orders, seed)
        return self._train_stacked(orders, seed)

    def _train_films(self, orders: Sequence[Tensor], seed: int) -> Stacked:
        """Train one after another, by loops that are compiled for this network."""
        recipe, (x0, condition) = self.recipe, self.examples
        noise, t = zip(*self._draws(orders[0].shape[1], seed), strict=True)
        start = {name: values[0] for name, values in self._start(1, seed).items()}
        rates = [recipe.learning_rate * self._rate(step) for step in range(recipe.steps)]
        models, losses = train_films(
            self.template,  # type: ignore[arg-type]
            start,
            (x0, condition.get("class_labels")),
            orders,
            (torch.stack(noise), torch.stack(t)),
            rates,
            recipe.ema_decay,
        )
        self._check(losses.sum(1), recipe.steps - 1)
        return models

    def _train_stacked(self, orders: Sequence[Tensor], seed: int) -> Stacked:
        """Train all together, by operations over their stacked weights."""
        recipe = self.recipe
        models = self._start(len(orders), seed)
        averages = {name: values.detach().clone() for name, values in models.items()}
        optimizer = torch.optim.AdamW(
            models.values(), lr=recipe.learning_rate, weight_decay=0.0, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        x0, condition = self.examples
        loss = vmap(self._call, in_dims=(0, 0, None, None, 0))
        for step, (noise, t) in enumerate(self._draws(orders[0].shape[1], seed)):
            chosen = torch.stack([order[step] for order in orders]).to(x0.device)  # [models, batch]
            labels = {name: values[chosen] for name, values in condition.items()}
            losses = loss(models, x0[chosen], noise.to(x0), t.to(x0.device), labels).mean(1)
            if step % 100 == 0:
                self._check(losses.detach().cpu().numpy(), step)
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()  # each model's gradient is its own: the sum mixes none
            optimizer.step()
            schedule.step()
            with torch.no_grad():  # the average starts from the weights after the first step
                weight = 1 - recipe.ema_decay if step else 1.0
                torch._foreach_lerp_(list(averages.values()), list(models.values()), weight)
        return averages

    def _draws(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield noise and timesteps of each step, the same for all models."""
        generator = torch.Generator().manual_seed(seed)
        ladder, shape = torch.tensor(list(self.template.ladder)), self.examples[0].shape[1:]
        for _ in range(self.recipe.steps):
            noise = torch.randn(batch, *shape, generator=generator)
            yield noise, ladder[torch.randint(len(ladder), (batch,), generator=generator)]

    def _check(self, losses: np.ndarray, step: int) -> None:
        if not np.isfinite(losses).all():
            raise DminError(
                f"the loss of a model became NaN by step {step}. Lower learning_rate (now "
                f"{self.recipe.learning_rate:g})."
            )

    def _start(self, count: int, seed: int) -> Stacked:
        """Return untrained weights, the same for each model, as leaves that take gradients."""
        torch.manual_seed(seed)
        network = self.model().network
        stacked, _ = stack_module_state([network])
        return {
            name: values.detach()
            .to(self.device)
            .expand(count, *values.shape[1:])
            .clone()
            .requires_grad_()
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


class Outcomes:
    """Losses of trained models on some queries, by the models' keys, a line each in a file.

    Args:
        path: of the file; None keeps them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, np.ndarray] = {}
        if self.path is not None and self.path.is_file():
            # A line that a kill cut off has no end, and is not read.
            for line in self.path.read_text().splitlines(keepends=True):
                if line.endswith("}\n"):
                    row = json.loads(line)
                    self.rows[row["model"]] = np.array(row["losses"])

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __getitem__(self, key: str) -> np.ndarray:
        return self.rows[key]

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """Keep the losses ``[Q]`` of more models."""
        self.rows |= rows
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                # It may stand behind a line that was cut off.
                file.write("\n" if file.tell() else "")
                for key, losses in rows.items():
                    file.write(json.dumps({"model": key, "losses": losses.tolist()}) + "\n")


def _for_vmap(model: DiffusionModel) -> DiffusionModel:
    """Write group norms out, in place: torch's own asks for a memory format that vmap has not."""
    for module in model.network.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = partial(_group_norm, module)  # type: ignore[method-assign]
    return model


def _group_norm(module: nn.GroupNorm, x: Tensor) -> Tensor:
    grouped = x.reshape(len(x), module.num_groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    normed = centred * (centred.square().mean(2, keepdim=True) + module.eps).rsqrt()
    if module.weight is None:
        return normed.view(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    return normed.view(x.shape) * module.weight.view(shape) + module.bias.view(shape)


def encoded(
    model: DiffusionModel, dataset: Dataset, device: torch.device | None = None
) -> tuple[Tensor, Condition]:
    """Return a whole dataset as a model takes it."""
    batch: dict[str, Any] = collate([dataset[i] for i in range(len(dataset))])
    device = device or torch.device("cpu")
    batch["image"] = batch["image"].to(device)
    with torch.no_grad():
        x0, condition = model.encode(batch)
    return x0.to(device), {name: values.to(device) for name, values in condition.items()}


def _key(subset: np.ndarray, seed: int) -> str:
    """Return what names the model trained on a subset."""
    return f"{array_digest(np.asarray(subset).astype(np.int64))}-{seed}"


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
