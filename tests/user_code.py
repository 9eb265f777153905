"""What users write, right and wrong, as type checkers see it; nothing runs it.

`make lint` checks it with mypy: each seeded mistake must be seen (`warn_unused_ignores`), and
nothing that is right may be refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from torch import Tensor

import dmin
import dmin.models
from dmin import Auto, DiffusionModel, Example, Examples, GradientCollector, Prediction, retrieve
from dmin.attribution import Method, load_ranking, save_ranking
from dmin.models import DDPM, auto


class Denoiser(DiffusionModel):
    """A model as the README has it."""

    timesteps = range(9, -1, -1)

    def predict(
        self, x0: Tensor, noise: Tensor, t: Tensor, condition: Mapping[str, Tensor]
    ) -> Prediction:
        return Prediction(self.network(x0), noise, torch.ones(len(x0)))


class Wrong(DiffusionModel):
    """A model whose ``predict`` returns something else."""

    def predict(  # type: ignore[override]
        self, x0: Tensor, noise: Tensor, t: Tensor, condition: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        return x0, noise


def right(model: DiffusionModel, images: list[Example], folder: Path) -> dmin.Ranking:
    """Collect and retrieve."""
    collector = GradientCollector(model, Auto(dim=4096), timesteps=dmin.Stratified(10))
    store = collector.collect(Examples(images), folder / "train")
    assert_type(store, dmin.Store)
    assert_type(len(store), int)
    assert_type(store.positions, np.ndarray)
    ranking = retrieve(store, store, dmin.DMin(), k=10)
    assert_type(ranking.train_ids, list[list[str]])
    assert_type(ranking.scores, np.ndarray)
    save_ranking(ranking, folder)
    assert_type(load_ranking(folder / "ranking.json"), dmin.Ranking)
    assert_type(auto("checkpoint"), DiffusionModel)
    return ranking


def wrong(model: DiffusionModel, store: dmin.Store, ranking: dmin.Ranking, method: Method) -> None:
    """Make one mistake a line."""
    GradientCollector("my/checkpoint")  # type: ignore[arg-type]
    GradientCollector(model, sketch=4096)  # type: ignore[arg-type]
    GradientCollector(model, Auto(dim="4096"))  # type: ignore[arg-type]
    GradientCollector(model, Auto(dimension=4096))  # type: ignore[call-arg]
    GradientCollector(model).collect("my/images", "my/store")  # type: ignore[arg-type]
    GradientCollector(model).collect(Examples([]))  # type: ignore[call-arg]
    retrieve(store, store, k="ten")  # type: ignore[arg-type]
    retrieve("my/queries", store)  # type: ignore[arg-type]
    retrieve(store, store, dmin.DMin)  # type: ignore[arg-type]
    print(retrieve(store, store).train_id)  # type: ignore[attr-defined]
    ranking.to_panda()  # type: ignore[attr-defined]
    ranking.train_ids[0][0] + 1  # type: ignore[operator]
    store.metadata["label"]  # type: ignore[call-overload]
    method.fit(ranking)  # type: ignore[arg-type]
    Example(id=1, image=torch.zeros(3, 8, 8))  # type: ignore[arg-type]
    DDPM.from_pretrained(1)  # type: ignore[arg-type]
    Prediction(torch.zeros(1))  # type: ignore[call-arg]
    dmin.Explicit("999, 500")  # type: ignore[arg-type]
    dmin.models.UNet("my/checkpoint")  # type: ignore[attr-defined]
    dmin.retreive(store, store)  # type: ignore[attr-defined]
