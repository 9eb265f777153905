"""The interface of a diffusion model."""

from __future__ import annotations

import functools
import hashlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from dmin.gradients.parameters import plain_name, uncompiled
from dmin.runtime.errors import DminError
from dmin.runtime.shown import ShownModel

Condition = Mapping[str, Tensor]
"""What the model is conditioned on: named tensors with one row an example."""


class Prediction(NamedTuple):
    """A model's prediction at a timestep and what it was trained to be."""

    prediction: Tensor  # [batch, C, H, W]
    target: Tensor  # [batch, C, H, W]
    weight: Tensor  # [batch], of the example's loss
    bound: Tensor | None = None  # [batch], added to the loss: it trains a learned variance
    dropped: Dropped | None = None
    loss: Tensor | None = None  # [batch], in place of the weighted squared error
    mask: Tensor | None = None  # [batch, 1, H, W], of the squared error


class Dropped(NamedTuple):
    """The same without the prompt, which training drops now and then."""

    share: float  # of the training steps
    prediction: Prediction


def _ladder(model: Any, *timesteps: Sequence[float]) -> Any:
    """Read or set a model's timesteps, as they were called in earlier releases."""
    warnings.warn("`ladder` of a model is now `timesteps`.", DeprecationWarning, stacklevel=2)
    if timesteps:
        (model.timesteps,) = timesteps
    return model.timesteps


class DiffusionModel(ShownModel, nn.Module):
    """A diffusion model as dmin sees it: encode, predict, sample.

    A model of your own needs :attr:`network` and :meth:`predict`; :meth:`encode` when it has
    latents or captions; :meth:`sample` and :meth:`condition` to generate queries.

    Attributes:
        network: the module whose parameters are attributed.
        timesteps: all of them in the order of sampling, pure noise first, in the model's own unit.
        externally_called: names of modules that the network calls outside the block they stand
            in. Only needed to share the network out over processes.
        label_names: what the classes were called when it was trained on labels that are text, in
            the order of their numbers; empty where labels are numbers.
        metadata_columns: columns of the examples' metadata that :meth:`encode` reads: a store is
            one of other data where these change, and of the same where others do.
    """

    network: nn.Module
    externally_called: Sequence[str] = ()
    label_names: Sequence[str] = ()
    metadata_columns: Sequence[str] = ()
    timesteps: Sequence[float] = range(999, -1, -1)

    ladder: Any = property(_ladder, _ladder)

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Take the ``ladder`` of a class of earlier releases for its timesteps."""
        super().__init_subclass__(**arguments)
        if "ladder" in vars(cls):
            _ladder(cls, vars(cls)["ladder"])
            del cls.ladder

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """Modules that only :meth:`encode` and :meth:`sample` need, by name.

        They are not children of the model. Whoever encodes moves them to a device and off again.
        """
        return {}

    def encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """Return what is diffused and what it is conditioned on; called once an example.

        Args:
            batch: ``image [batch, C, H, W]`` in [0, 1], of clips ``[batch, C, F, H, W]``;
                ``label``, ``caption``, ``id``, ``metadata``, ``sizes``: lists. Of data with
                condition images also ``condition_image [batch, C', H', W']`` in [0, 1].

        Returns:
            ``x0 [batch, ...]`` in the space the model diffuses, and the condition.
        """
        return 2 * batch["image"] - 1, {}

    @abstractmethod
    def predict(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """Return the network's prediction for noised examples, its target and weight.

        Args:
            x0: ``[batch, ...]`` from :meth:`encode`.
            noise: standard normal, of the same shape.
            t: ``[batch]``, timesteps of the model.
            condition: from :meth:`encode`.
        """

    @classmethod
    def reads_captions(cls, settings: Mapping[str, Any]) -> bool:
        """Say whether examples need captions by a model loaded with these settings."""
        return False

    @classmethod
    def reads_condition_images(cls, settings: Mapping[str, Any]) -> bool:
        """Say whether examples need condition images by a model loaded with these settings."""
        return False

    def unused_at(self, t: float) -> tuple[str, ...]:
        """Return how names of parameters begin that a timestep does not use: of other networks."""
        return ()

    def for_queries(self) -> Self:
        """Return the model that queries are differentiated with: itself, unless they are guided."""
        return self

    def describe_query(self) -> dict[str, Any]:
        """Return what sets the loss of queries apart from that of training examples, as JSON."""
        return {}

    def condition(self, prompts: Sequence[Any]) -> Condition:
        """Return the condition for sampling from prompts: class labels, or captions."""
        return {}

    def sample(self, prompts: Sequence[Any], seeds: Sequence[int], steps: int) -> Tensor:
        """Generate one image a prompt, each from a seed of its own.

        Args:
            prompts: class labels or captions, as the model takes them.
            seeds: as many; an image depends on its own seed and prompt only.
            steps: denoising steps.

        Returns:
            ``[len(prompts), C, H, W]`` in [0, 1].
        """
        raise DminError(
            f"{type(self).__name__} cannot generate images. Give queries as image files instead."
        )

    def trajectory(
        self, prompts: Sequence[Any], seeds: Sequence[int], steps: int, states: int
    ) -> Tensor:
        """Return what the model took each image for while :meth:`sample` would generate it.

        Args:
            prompts: as for :meth:`sample`, as are seeds and steps.
            seeds: of the images.
            steps: denoising steps.
            states: how many are recorded, evenly spaced, the last step among them.

        Returns:
            ``[states, len(prompts), C, H, W]`` in [0, 1]: its estimate of the clean image.
        """
        raise DminError(
            f"{type(self).__name__} does not record how images are generated. Set "
            f"queries.trajectory=0; only journey_trak needs it."
        )

    def facts_of_samples(self) -> dict[str, Any]:
        """Return metadata of generated images: what :meth:`encode` would otherwise not know."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Return what, beside the weights, defines the loss: part of the feature fingerprint."""
        return {"model": type(self).__name__}

    def describe_sampling(self) -> dict[str, Any]:
        """Return what, beside weights, prompts, seeds and steps, decides generated images."""
        return {"model": type(self).__name__}


Readout = Callable[[Prediction], Tensor]


def expected(readout: Readout) -> Readout:
    """Have a readout be its mean over prompt dropout: ``(1 − p) f(given) + p f(dropped)``."""

    @functools.wraps(readout)
    def mean(prediction: Prediction) -> Tensor:
        given = readout(prediction)
        if prediction.dropped is None:
            return given
        share = prediction.dropped.share
        return (1 - share) * given + share * readout(prediction.dropped.prediction)

    return mean


@expected
def per_example_loss(prediction: Prediction) -> Tensor:
    """Return the training loss of each example, ``[batch]``: weighted mean over its pixels.

    ``L_b = w_b · mean_p m_bp (prediction_bp − target_bp)²``, m a mask or 1, or the model's own
    loss; and the bound of a learned variance.

    Raises:
        DminError: there is a mask, and the loss is no squared error of an image.
    """
    loss, mask = prediction.loss, prediction.mask
    output = prediction.prediction
    plain = loss is None and prediction.bound is None
    if mask is not None and not (plain and output.shape[2:] == mask.shape[2:]):
        raise DminError(
            "the data have loss masks, which need a plain squared error of an image, and this "
            "model has another loss (model.loss_type, model.variance_loss, or its own). Leave the "
            "masks out, or set model.loss_type=l2."
        )
    if loss is None:
        error = (output - prediction.target).square()
        loss = prediction.weight * (error if mask is None else mask * error).flatten(1).mean(1)
    return loss if prediction.bound is None else loss + prediction.bound


def weight_of_squares(prediction: Prediction) -> Tensor:
    """Return the weight of each example's squared error, ``[batch]``.

    Raises:
        DminError: the loss is no squared error.
    """
    if prediction.loss is not None:
        raise DminError(
            "this method's curvature assumes a squared error, and the model has another loss "
            "(model.loss_type, or its own). Choose a method without curvature, or set "
            "method.curvature=hessian if the method has that setting."
        )
    if prediction.mask is not None:
        raise DminError(
            "this method's curvature assumes a plain squared error, and the data have loss masks. "
            "Choose a method without curvature, or leave the masks out."
        )
    return prediction.weight


@expected
def mean_squared_output(prediction: Prediction) -> Tensor:
    """Return the mean square of each example's prediction, ``[batch]`` (D-TRAK's readout).

    Source: Zheng et al. 2024, "Intriguing Properties of Data Attribution on Diffusion Models".
    """
    return _counted(prediction.prediction.square(), prediction)


@expected
def mean_output(prediction: Prediction) -> Tensor:
    """Return the mean of each example's prediction, ``[batch]`` (DAS's readout).

    Source: Lin et al. 2025, "Diffusion Attribution Score" (arXiv 2410.18639).
    """
    return _counted(prediction.prediction, prediction)


def _counted(values: Tensor, prediction: Prediction) -> Tensor:
    """Return the mean over an example's values, each counted as the mask says."""
    mask = prediction.mask
    return (values if mask is None else mask * values).flatten(1).mean(1)


READOUTS: dict[str, Readout] = {
    "loss": per_example_loss,
    "mean_squared_output": mean_squared_output,
    "mean_output": mean_output,
}
"""Functions of a prediction with one value an example, whose gradients can be collected."""


def weights_digest(module: nn.Module) -> str:
    """Return 16 hexadecimal digits of every weight and buffer, whatever device they are on.

    All processes have to ask for it where the weights are shared out over them.
    """
    digest = hashlib.sha256()
    tensors = {plain_name(name): x for name, x in uncompiled(module).state_dict().items()}
    for name, tensor in sorted(tensors.items()):
        if hasattr(tensor, "full_tensor"):  # sharded: the digest is that of the whole
            tensor = tensor.full_tensor()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def noise_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return a CPU generator for each seed, so that an image does not depend on its batch."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]
