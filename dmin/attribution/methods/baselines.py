"""Baselines that use neither gradients nor images: chance, and the training loss."""

import hashlib

import torch
from torch import Tensor

from dmin.attribution.features import ExampleBlock, FeatureSet, Requires
from dmin.attribution.method import Method


class Random(Method):
    """A random score for each pair of ids, uniform on [0, 1): the level of chance.

    Args:
        seed: key of the draw.
    """

    name = "random"
    requires: Requires = Requires(readouts=())

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, queries: ExampleBlock, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``, which depends only on the pairs of ids."""
        return torch.tensor([[self._draw(q, i) for i in train.ids] for q in queries.ids])

    def limit(self, queries: ExampleBlock, sign: int = 1) -> Tensor:
        """Return 1 or 0."""
        return torch.full((len(queries.ids),), float(sign > 0))

    def _draw(self, query: str, example: str) -> float:
        digest = hashlib.blake2b(f"{self.seed}\0{query}\0{example}".encode(), digest_size=3)
        return int.from_bytes(digest.digest(), "little") / 2**24


class TrainingLoss(Method):
    """The training loss of an example: the same score for every query.

    ``I(q, i) = Σ_t L_t(i) / mean_j L_t(j)``, averaged over noise draws

    This is the squared error in `das`, without its kernel. Rare examples are learned
    badly, so the loss alone finds most of a rare source: a useful method must do
    better, and not return the same examples for every query.
    """

    name = "training_loss"
    by_query = False
    requires: Requires = Requires(readouts=())

    def fit(self, train: FeatureSet) -> None:
        """Read the losses of all examples."""
        losses = torch.from_numpy(train.store.losses()).double()
        relative = losses / losses.mean(0).clamp(min=torch.finfo(torch.float32).tiny)
        self._scores = dict(zip(train.store.ids, relative.mean(1).sum(1).float(), strict=True))

    def score(self, queries: ExampleBlock, train: ExampleBlock) -> Tensor:
        """Return ``[Q, n]``, all rows the same."""
        found = torch.stack([self._scores[id] for id in train.ids])
        return found.expand(len(queries.ids), -1)
