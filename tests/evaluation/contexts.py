"""Small contexts to measure in: real stores of a tiny model, retraining whose truth is known."""

import numpy as np
import torch
from toy_ddpm import TINY_UNET

from dmin.attribution import FeatureSet
from dmin.collect import GradientCollector, predict_trainer
from dmin.diffusion.timesteps import Stratified
from dmin.evaluation import BenchmarkContext
from dmin.models.families.ddpm import DDPM
from dmin.queries import Planted
from dmin.sketches import BlockCyclic


def small_context(model, dataset, folder, dim=256, **known):
    def collect(model, dataset, role):
        collector = GradientCollector(model, BlockCyclic(dim), Stratified(2))
        trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
        path = folder / f"{role}-{collector.manifest(dataset).fingerprint}"
        return collector.collect(dataset, path, trainer=trainer)

    def ask(name, source):
        queries = source.plant(dataset) if isinstance(source, Planted) else source
        return FeatureSet(collect(model, queries, name), queries)

    torch.manual_seed(5)
    untrained = DDPM.build(TINY_UNET, {"beta_schedule": "squaredcos_cap_v2"}).eval()
    train = FeatureSet(collect(model, dataset, "train"), dataset)
    return BenchmarkContext(model, train, ask, collect, untrained=untrained, **known)


class LinearContext:
    """A context in which every example lowers a query's loss by its true score, plus chance."""

    def __init__(self, truth, store=None, noise=0.0):
        self.truth, self.noise = truth, noise
        self.train = _Rows(truth.shape[1], store)
        self.asked = []

    def retrain(self, subsets, seed, asked, what):
        self.asked.append((what, len(subsets)))
        kept = np.stack([np.isin(np.arange(self.truth.shape[1]), s) for s in subsets])
        losses = 100 - kept.astype(float) @ self.truth.T
        generator = np.random.default_rng([seed, len(subsets)])
        return losses + self.noise * generator.normal(size=losses.shape)


class _Rows:
    def __init__(self, count, store):
        self.count, self.store = count, store

    def __len__(self):
        return self.count
