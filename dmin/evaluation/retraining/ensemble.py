"""Train many small models at once, for ground truth by retraining."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import stack_module_state, vmap

from dmin.data.base import Dataset, describe_dataset
from dmin.diffusion.inputs import NoisedExamples
from dmin.diffusion.noise import Noise
from dmin.evaluation.retraining.film_training import can_train, train_films
from dmin.evaluation.retraining.kept_models import Outcomes, Weights, model_key
from dmin.evaluation.retraining.recipe import Recipe
from dmin.evaluation.retraining.stacked_models import Stacked, StackedLoss, encoded, for_vmap
from dmin.models.base import Condition, DiffusionModel
from dmin.runtime.errors import DminError
from dmin.runtime.fingerprint import fingerprint
from dmin.train import learn_labels

Progress = Callable[[int, int], None]
"""Called with the number of models done, and of all models."""


class Ensemble:
    """Trains models of one kind on subsets of one dataset, and caches them on disk.

    Models of one seed have the same initial weights, and the same noise and timesteps at each step.
    So they differ only in their data, and seeds differ in everything random.

    Trained models are found again by subset and seed. So measuring one more method trains only the
    models that it needs.

    Args:
        model: builds an untrained model; torch's generator is seeded before each call.
        dataset: all training examples; read once, and kept in memory.
        recipe: how to train.
        cache: folder for weights and losses, under a fingerprint of everything they depend on. An
            interrupted run resumes from it. None: no cache.
        chunk: models trained together.
        device: of training.
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
        self.recipe: Recipe = recipe or Recipe()
        self.chunk = chunk
        self.device: torch.device = torch.device(device)
        self.template: DiffusionModel = for_vmap(model().requires_grad_(False).to(self.device))
        learn_labels(self.template, dataset)
        self.loss: StackedLoss = StackedLoss(self.template)
        self.examples: tuple[Tensor, Condition] = encoded(self.template, dataset, self.device)
        self.dataset: dict[str, Any] = describe_dataset(dataset)
        self._kept: dict[str, Outcomes] = {}
        self.cache: Path | None = (
            None if cache is None else Path(cache) / f"ensemble-{self._fingerprint()}"
        )
        self.weights: Weights = Weights(self.cache)

    def train(
        self,
        subsets: Sequence[np.ndarray],
        seed: int,
        on_progress: Progress = lambda done, total: None,
    ) -> Stacked:
        """Return a trained model for each subset.

        Args:
            subsets: positions in the dataset, one array per model, of any lengths.
            seed: of weights, order, timesteps and noise.
            on_progress: called with the number of models done, and of all models.

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
            on_progress(len(parts), len(subsets))
        found = [parts[model_key(subset, seed)] for subset in subsets]
        return {name: torch.stack([part[name] for part in found]) for name in found[0]}

    def outcomes(
        self,
        subsets: Sequence[np.ndarray],
        seed: int,
        queries: Dataset,
        timesteps: Sequence[float],
        noise: Noise,
        on_progress: Progress = lambda done, total: None,
    ) -> np.ndarray:
        """Return the losses on queries of models trained on the subsets, float64 ``[models, Q]``.

        Like :meth:`train` and then :meth:`losses`, but the losses are cached as well.
        """
        kept = self._outcomes([describe_dataset(queries), list(timesteps), noise.describe()])
        keys = [model_key(subset, seed) for subset in subsets]
        missing = [s for s, key in zip(subsets, keys, strict=True) if key not in kept]
        done = len(subsets) - len(missing)
        on_progress(done, len(subsets))
        for chunk in self._chunks(missing, seed):
            losses = self.losses(self._models(chunk, seed), queries, timesteps, noise)
            kept.add(dict(zip(chunk, losses, strict=True)))
            done += sum(model_key(s, seed) in chunk for s in missing)
            on_progress(done, len(subsets))
        return np.stack([kept[key] for key in keys])

    def losses(
        self, models: Stacked, dataset: Dataset, timesteps: Sequence[float], noise: Noise
    ) -> np.ndarray:
        """Return each model's loss of each example, mean over timesteps and draws.

        Args:
            models: from :meth:`train`.
            dataset: examples, such as queries; all have the same noise.
            timesteps: chosen from the model's timesteps.
            noise: shared by models and examples.

        Returns:
            float64 ``[models, examples]``.
        """
        x0, condition = encoded(self.template, dataset, self.device)
        models = {name: values.to(self.device) for name, values in models.items()}
        loss = vmap(self.loss.of, in_dims=(0, None, None, None, None))
        total = torch.zeros(len(next(iter(models.values()))), len(x0), dtype=torch.float64)
        inputs = NoisedExamples(noise, timesteps, x0, condition, [""] * len(x0))
        first = torch.arange(len(x0)) * inputs.points
        points = torch.arange(inputs.points).view(noise.draws, -1).T.flatten()  # by timestep
        with torch.no_grad():
            for point in points:
                total += loss(models, *inputs.at(first + point)).cpu()
        return (total / inputs.points).numpy()

    def load(self, models: Stacked, index: int) -> DiffusionModel:
        """Return one of the models as a separate model, in eval mode."""
        model = self.model()
        model.label_names = self.template.label_names
        model.network.load_state_dict({name: values[index] for name, values in models.items()})
        return model.eval()

    def _outcomes(self, made_of: list[Any]) -> Outcomes:
        name = f"losses-{fingerprint({'made_of': made_of})}.jsonl"
        if name not in self._kept:
            self._kept[name] = Outcomes(None if self.cache is None else self.cache / name)
        return self._kept[name]

    def _chunks(self, subsets: Sequence[np.ndarray], seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the distinct subsets by key, in chunks that are trained together."""
        distinct = list({model_key(subset, seed): np.asarray(subset) for subset in subsets}.items())
        for start in range(0, len(distinct), self.chunk):
            yield dict(distinct[start : start + self.chunk])

    def _models(self, subsets: dict[str, np.ndarray], seed: int) -> Stacked:
        """Return trained models, from the cache where possible."""
        parts = {key: self.weights.found(key) for key in subsets}
        missing = [key for key, part in parts.items() if part is None]
        if missing:
            trained = self._train([subsets[key] for key in missing], seed)
            for number, key in enumerate(missing):
                one = {n: values[number].cpu().contiguous() for n, values in trained.items()}
                parts[key] = one
                self.weights.keep(key, one)
        names = next(part for part in parts.values() if part is not None)
        return {n: torch.stack([part[n] for part in parts.values() if part]) for n in names}

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
        orders = [self.recipe.order(subset, seed) for subset in subsets]
        if can_train(self.template, self.device):
            return self._train_films(orders, seed)
        return self._train_stacked(orders, seed)

    def _train_films(self, orders: Sequence[Tensor], seed: int) -> Stacked:
        """Train one model after another, by loops compiled for this network."""
        recipe, (x0, condition) = self.recipe, self.examples
        noise, t = zip(*self._draws(orders[0].shape[1], seed), strict=True)
        start = {name: values[0] for name, values in self._start(1, seed).items()}
        rates = [recipe.learning_rate * recipe.rate(step) for step in range(recipe.steps)]
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
        """Train all models together, by operations on their stacked weights."""
        recipe = self.recipe
        models = self._start(len(orders), seed)
        averages = {name: values.detach().clone() for name, values in models.items()}
        rate = recipe.learning_rate
        optimizer = torch.optim.AdamW(models.values(), lr=rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
        x0, condition = self.examples
        loss = vmap(self.loss.of, in_dims=(0, 0, None, None, 0))
        for step, (noise, t) in enumerate(self._draws(orders[0].shape[1], seed)):
            chosen = torch.stack([order[step] for order in orders]).to(x0.device)  # [models, batch]
            labels = {name: values[chosen] for name, values in condition.items()}
            losses = loss(models, x0[chosen], noise.to(x0), t.to(x0.device), labels).mean(1)
            if step % 100 == 0:
                self._check(losses.detach().cpu().numpy(), step)
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()  # each loss depends on one model only
            optimizer.step()
            schedule.step()
            with torch.no_grad():  # the average starts from the weights after the first step
                weight = 1 - recipe.ema_decay if step else 1.0
                torch._foreach_lerp_(list(averages.values()), list(models.values()), weight)
        return averages

    def _draws(self, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield noise and timesteps of each step, the same for all models."""
        generator = torch.Generator().manual_seed(seed)
        timesteps, shape = torch.tensor(list(self.template.timesteps)), self.examples[0].shape[1:]
        for _ in range(self.recipe.steps):
            noise = torch.randn(batch, *shape, generator=generator)
            yield noise, timesteps[torch.randint(len(timesteps), (batch,), generator=generator)]

    def _check(self, losses: np.ndarray, step: int) -> None:
        if not np.isfinite(losses).all():
            raise DminError(
                f"the loss of a model became NaN by step {step}. Lower learning_rate (now "
                f"{self.recipe.learning_rate:g})."
            )

    def _start(self, count: int, seed: int) -> Stacked:
        """Return initial weights, the same for each model, as leaves that require gradients."""
        torch.manual_seed(seed)
        network = self.model().network
        stacked, _ = stack_module_state([network])
        start = {name: values.detach().to(self.device) for name, values in stacked.items()}
        return {n: v.expand(count, *v.shape[1:]).clone().requires_grad_() for n, v in start.items()}
