"""A model's loss as a function of its attributed parameters, for methods that run the model."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.utils._pytree import tree_map

from dmin.attribution.features import FeatureSet, FeatureSource
from dmin.data.base import Example, collate
from dmin.diffusion.inputs import NoisedBatch, NoisedExamples
from dmin.diffusion.noise import Noise
from dmin.models.base import Condition, DiffusionModel, Prediction, per_example_loss
from dmin.models.masked import COUNT, encode, predict
from dmin.runtime.errors import DminError

log = logging.getLogger(__name__)

Weights = dict[str, Tensor]
"""Tensors by the names of the attributed parameters."""


class FunctionalLoss:
    """The loss ``L(θ; x, ε_t, t)`` at the points (draw, timestep) of a store, and its gradients.

    Everything is computed in the precision and on the device of the model's weights. The model is
    not changed.

    Args:
        origin: the collector that made the store.
        timesteps: some of the store's; None for all.
        known: examples whose encodings may be cached, and are then not computed again.

    Raises:
        DminError: a timestep is not in the store.
    """

    def __init__(
        self,
        origin: FeatureSource,
        timesteps: Sequence[float] | None = None,
        known: FeatureSet | None = None,
    ) -> None:
        self.origin = origin
        self.known = known
        self.model: DiffusionModel = origin.model
        self.noise: Noise = origin.noise
        chosen = tuple(origin.timesteps if timesteps is None else timesteps)
        wrong = [t for t in chosen if t not in origin.timesteps]
        if wrong or not chosen:
            raise DminError(
                f"timesteps={list(chosen)}: choose timesteps of the store: "
                f"{', '.join(f'{t:g}' for t in origin.timesteps)}."
            )
        self.timesteps = chosen
        self.points: int = self.noise.draws * len(chosen)
        named = dict(origin.model.network.named_parameters())
        self.weights: Weights = {e.name: named[e.name].detach() for e in origin.attributed.entries}
        self.count: int = sum(value.numel() for value in self.weights.values())
        self.forward: bool = True  # whether the model has derivatives in forward mode
        self._begun = False
        self._prediction = _Call(origin.model)

    def pairs(self, examples: Sequence[Example], counts: Tensor | None = None) -> NoisedBatch:
        """Return every example at every point; the points of an example are consecutive.

        Args:
            examples: the examples.
            counts: how often each counts in sums over the pairs; None: once.
        """
        like = next(iter(self.weights.values()))
        batch: dict[str, Any] = collate(examples)
        x0, condition = self._encoded(batch, like)
        if counts is not None:
            each = counts.to(like).repeat_interleave(len(x0) // len(counts))
            condition = {**condition, COUNT: each}
        found = NoisedExamples(self.noise, self.timesteps, x0, condition, batch["id"]).all()
        if not self._begun:  # what a model keeps of its first call must not be of a derivative's
            with torch.no_grad():
                predict(self.model, found.rows(slice(1)))
            self._begun = True
        return found

    def _encoded(self, batch: dict[str, Any], like: Tensor) -> tuple[Tensor, Condition]:
        """Return encodings from the cache, or from the model."""
        if self.known is not None:
            store, root = self.known.store, self.known.encodings
            kept = self.origin.cached_encodings(store, batch["id"], root)
            if kept is not None:
                x0, named = kept
                return x0.to(like), {name: value.to(like.device) for name, value in named.items()}
        with torch.no_grad():
            return encode(self.model, _as(like, batch))

    def predict(self, weights: Mapping[str, Tensor], pairs: NoisedBatch) -> Prediction:
        """Return the prediction of the model with other weights; differentiable in them."""
        named = {f"model.network.{name}": value for name, value in weights.items()}
        # Only the plain form of attention has derivatives of every kind.
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            found: Prediction = functional_call(self._prediction, named, tuple(pairs))
        return found

    def losses(self, weights: Mapping[str, Tensor], pairs: NoisedBatch) -> Tensor:
        """Return the loss of each pair, ``[n]``; differentiable in the weights."""
        return per_example_loss(self.predict(weights, pairs))

    def gradients(self, examples: Sequence[Example], batch_size: int = 512) -> Tensor:
        """Return each example's gradient summed over the points, ``[n, P]``."""
        rows = []
        for example in examples:
            total = torch.zeros_like(self.flat(self.weights))
            for piece in self.pairs([example]).split(batch_size):
                weights = {n: w.clone().requires_grad_() for n, w in self.weights.items()}
                loss = self.losses(weights, piece).sum()
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                total += self.flat(dict(zip(weights, found, strict=True)))
            rows.append(total)
        return torch.stack(rows)

    def along(self, function: Callable[[Weights], Any], direction: Weights) -> Any:
        """Return the derivative of a function of the weights along a direction.

        In forward mode, or, if an operation has no forward derivative, by transposing the reverse
        derivative, which is equally exact but slower.
        """
        if self.forward:
            try:
                return jvp(function, (self.weights,), (direction,))[1]
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                log.debug("no forward derivative of %s: %s", type(self.model).__name__, error)
                self.forward = False
        out, back = reverse(function, self.weights)
        zeros = tree_map(torch.zeros_like, out)
        transposed = reverse(lambda cotangent: back(cotangent)[0], zeros)[1]
        return transposed(direction)[0]

    def flat(self, values: Mapping[str, Tensor | None]) -> Tensor:
        """Return values of all attributed parameters as a vector ``[P]``; missing ones are zero."""
        parts = [
            w.new_zeros(w.numel()) if (value := values[name]) is None else value.reshape(-1)
            for name, w in self.weights.items()
        ]
        return torch.cat(parts)

    def shaped(self, vectors: Tensor) -> Weights:
        """Return vectors ``[..., P]`` cut into the parameters' shapes, ``[..., *shape]``."""
        sizes = [w.numel() for w in self.weights.values()]
        pieces = vectors.split(sizes, -1)
        leading = vectors.shape[:-1]
        names = self.weights.items()
        return {n: p.reshape(*leading, *w.shape) for (n, w), p in zip(names, pieces, strict=True)}


def _as(like: Tensor, batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch, and its draws, with the dtype and device of a tensor."""
    drawn = {"drawn": [_as(like, each) for each in batch["drawn"]]} if "drawn" in batch else {}
    return {**batch, "image": batch["image"].to(like), **drawn}


def reverse(function: Callable[[Any], Any], at: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return a function's value, and its transposed derivative."""
    found: Any = vjp(function, at)
    return found[0], found[1]


class _Call(nn.Module):
    """A model's prediction as a module's forward, which torch can call with other weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Prediction:
        return predict(self.model, NoisedBatch(x0, noise, t, condition))
