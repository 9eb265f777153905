"""The data, models and stores of the experiment: made once, found again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dmin.attribution import Side
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Example, Examples
from dmin.data.digits import Digits
from dmin.evaluation import Ensemble, Recipe
from dmin.evaluation.lds import random_subsets
from dmin.models.base import DiffusionModel
from dmin.models.mlp import MLP
from dmin.noise import SharedNoise
from dmin.queries import Planted
from dmin.sketches import BlockCyclic
from dmin.timesteps import Stratified

NATIVE, FOREIGN = 960, 40  # training digits, and transposed ones of a second source
ATTRIBUTED, FIRST_SEED = 1000, 0  # seeds: of the model asked about, of the retrained ones
READOUTS = ("loss", "mean_squared_output", "mean_output")


@dataclass(frozen=True)
class Size:
    """How much is retrained and kept."""

    subsets: int = 64
    seeds: int = 2
    dim: int = 2048
    resamples: int = 1000
    steps: int = 1500


class World:
    """Everything that methods and ground truths are measured on."""

    def __init__(self, size: Size, cache: Path) -> None:
        self.size, self.cache = size, cache
        self.train = training_examples()
        model = partial(MLP.small, width=96, depth=3, embedding=32)
        self.ensemble = Ensemble(model, self.train, Recipe(size.steps), cache / "models")
        everything = [np.arange(len(self.train))]
        self.model = self.ensemble.load(self.ensemble.train(everything, ATTRIBUTED), 0)
        self.untrained = untrained(model)
        self.roles = query_examples(self.model, self.train)
        merged = [e for examples in self.roles.values() for e in examples.examples]
        self.queries = Examples(merged)
        ends = np.cumsum([len(examples) for examples in self.roles.values()])
        self.rows = {
            role: np.arange(end - len(examples), end)
            for (role, examples), end in zip(self.roles.items(), ends, strict=True)
        }

    def sides(self, model: DiffusionModel, readouts: tuple[str, ...]) -> tuple[Side, Side]:
        """Return queries and training examples with their features under a model."""
        collector = GradientCollector(
            model, BlockCyclic(self.size.dim), Stratified(10), SharedNoise(), readouts=readouts
        )
        found = []
        for dataset in (self.queries, self.train):
            name = collector.manifest(dataset).fingerprint
            store = collector.collect(
                dataset, self.cache / f"store-{name}", trainer=predict_trainer(accelerator="cpu")
            )
            found.append(Side(store, dataset))
        return found[0], found[1]

    def losses(self, subsets, seed: int, log) -> np.ndarray:
        """Return what models of the subsets lose on each query: 20 timesteps, 4 draws."""
        steps, noise = Stratified(20)(self.model.ladder), SharedNoise(seed=1, draws=4)
        return self.ensemble.outcomes(subsets, seed, self.queries, steps, noise, log)

    def retrained(self, log) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the subsets, and the losses ``[seeds, M, Q]`` of the models trained on them."""
        subsets = random_subsets(len(self.train), self.size.subsets)
        seeds = range(FIRST_SEED, FIRST_SEED + self.size.seeds)
        return subsets, np.stack([self.losses(subsets, seed, log) for seed in seeds])


def training_examples() -> Examples:
    """Return 960 digits and 40 transposed ones, each with its source."""
    digits = Digits("train").examples
    native = [replace(e, metadata={"source": "digits"}) for e in digits[:NATIVE]]
    foreign = [transposed(e) for e in digits[NATIVE : NATIVE + FOREIGN]]
    return Examples(native + foreign)


def query_examples(model: DiffusionModel, train: Examples) -> dict[str, Examples]:
    """Return queries by role; those that settings are chosen on (tune) are in no other."""
    held_out = Digits("heldout").examples
    labels = [label for label in range(10) for _ in range(5)]
    images = model.sample(labels, range(len(labels)), steps=50)
    generated = [
        Example(f"generated-{i}", image, label, None, {"source": "digits"})
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    return {
        "generated": Examples(generated),
        "heldout": Examples([replace(e, metadata={"source": "digits"}) for e in held_out[:50]]),
        "tune": Examples([transposed(e) for e in held_out[100:140]]),
        "test": Examples([transposed(e) for e in held_out[140:200]]),
        "noisy": Planted("noisy", count=40, noise=0.2).plant(train),
    }


def transposed(example: Example) -> Example:
    """Return an example mirrored along its diagonal: a foreign source in the same colours."""
    image = example.image.transpose(1, 2).contiguous()
    metadata = {"source": "transposed"}
    return Example(f"foreign-{example.id}", image, example.label, None, metadata)


def untrained(model) -> DiffusionModel:
    torch.manual_seed(ATTRIBUTED)
    return model().eval()
