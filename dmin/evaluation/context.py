"""The context of a benchmark: a model and its data, their stores, and retrained models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dmin.attribution import FeatureSet
from dmin.data.base import Dataset
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Stratified
from dmin.evaluation.retraining.ensemble import Ensemble
from dmin.models.base import DiffusionModel
from dmin.runtime.errors import DminError
from dmin.store import Store, maintenance as operations

OnProgress = Callable[[str, int, int], None]
"""Called with the current step, the amount done, and the total amount."""

FIRST_SEED = 1  # of retrained models; the attributed model has the seed of the configuration


@dataclass
class BenchmarkContext:
    """A model, its training data, and functions that make what ground truths need.

    Args:
        model: the attributed model.
        train: its training examples with their features.
        ask: a function of a store's name and a source of queries (a dataset, or one of
            ``dmin.queries``) that returns the queries with all features that the methods require.
        collect: makes or finds the store of a dataset under another model.
        ensemble: trains such models on subsets; None if no recipe is configured.
        untrained: the same model with initial weights; None if unknown.
        on_progress: shows progress.
        timesteps: number of evenly spaced timesteps of the losses of retrained models. Timesteps
            and noise differ from those of the store.
        draws: of noise at each timestep.
    """

    model: DiffusionModel
    train: FeatureSet
    ask: Callable[[str, Any], FeatureSet]
    collect: Callable[[DiffusionModel, Dataset, str], Store]
    ensemble: Ensemble | None = None
    untrained: DiffusionModel | None = None
    on_progress: OnProgress = lambda what, done, total: None
    timesteps: int = 20
    draws: int = 4
    _sides: dict[tuple[str, bool], FeatureSet] = field(default_factory=dict)

    def train_side(self, blind: bool = False) -> FeatureSet:
        """Return the training examples; blind: with features of the untrained network."""
        return self._blind("train", self.train) if blind else self.train

    def query_side(self, name: str, source: Any, blind: bool = False) -> FeatureSet:
        """Return queries with their features; if the source is None, the training examples."""
        if source is None:
            return self.train_side(blind)
        if (name, False) not in self._sides:
            self._sides[name, False] = self.ask(name, source)
        side = self._sides[name, False]
        return self._blind(name, side) if blind else side

    def at(self, dim: int) -> BenchmarkContext:
        """Return the same context with sketches folded to ``dim`` dimensions."""
        if dim == self.train.store.layout.dim:
            return self

        def smaller(side: FeatureSet) -> FeatureSet:
            return FeatureSet(folded(side.store, dim), side.dataset, origin=side.origin)

        return replace(
            self,
            train=smaller(self.train),
            ask=lambda name, source: smaller(self.query_side(name, source)),
            collect=lambda *asked: folded(self.collect(*asked), dim),
            _sides={},
        )

    def describe(self) -> dict[str, str]:
        """Return a description of model and features, for the report."""
        layout = self.train.store.layout
        parameters = sum(p.numel() for p in self.model.network.parameters())
        sketch = self.train.store.manifest.features.get("sketch", {})
        family = sketch.get("family", "") if isinstance(sketch, dict) else sketch
        return {
            "training examples": f"{len(self.train):,}",
            "model": f"{type(self.model).__name__}, {parameters:,} parameters",
            "features": f"{family}, k = {layout.dim:,}, T = {len(layout.timesteps)}, "
            f"{layout.draws} draw(s) of noise, {layout.dtype}",
            "readouts": ", ".join(layout.readouts),
        }

    def retrain(
        self, subsets: Sequence[np.ndarray], seed: int, asked: FeatureSet, what: str
    ) -> Any:
        """Return the losses on queries of models trained on subsets, float64 ``[models, Q]``.

        Args:
            subsets: rows of the training store, one array per model.
            seed: number of the training seed, from 0.
            asked: the queries.
            what: label of the progress bar.

        Raises:
            DminError: no training recipe is configured.
        """
        if self.ensemble is None:
            raise DminError(
                "this ground truth retrains the model on subsets of the data, and "
                "no training is configured. Set train=<choice>, as for `dmin train`."
            )
        assert asked.dataset is not None
        return self.ensemble.outcomes(
            [np.asarray(subset) for subset in subsets],
            FIRST_SEED + seed,
            asked.dataset,
            list(Stratified(self.timesteps)(self.model.timesteps)),
            SharedNoise(seed=1, draws=self.draws),
            lambda done, total: self.on_progress(what, done, total),
        )

    def _blind(self, name: str, side: FeatureSet) -> FeatureSet:
        """Return a feature set with features of the untrained network."""
        if self.untrained is None:
            raise DminError(
                "the control on an untrained network needs a training configuration. Set "
                "train=<choice>, or leave the control out with benchmark.untrained=false."
            )
        if (name, True) not in self._sides:
            assert side.dataset is not None
            store = self.collect(
                self.untrained, side.dataset, f"untrained-{name.replace('_', '-')}"
            )
            self._sides[name, True] = FeatureSet(store, side.dataset)
        return self._sides[name, True]


def folded(store: Store, dim: int) -> Store:
    """Return a store folded to a smaller sketch; it is written beside the store if missing."""
    if dim == store.layout.dim:
        return store
    return operations.fold(store, store.path.with_name(f"{store.path.name}-k{dim}"), dim)
