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
"""The model's conditions: named tensors with one row per example."""


class Prediction(NamedTuple):
    """A model's prediction at a timestep, with its training target."""

    prediction: Tensor  # [batch, C, H, W]
    target: Tensor  # [batch, C, H, W]
    weight: Tensor  # [batch], of the example's loss
    bound: Tensor | None = None  # [batch], added to the loss to train a learned variance
    dropped: Dropped | None = None
    loss: Tensor | None = None  # [batch], replaces the weighted squared error
    mask: Tensor | None = None  # [batch, 1, H, W], of the squared error


class Dropped(NamedTuple):
    """The prediction without the prompt, for a model trained with prompt dropout."""

    share: float  # fraction of the training steps without prompt
    prediction: Prediction


def _ladder(model: Any, *timesteps: Sequence[float]) -> Any:
    """Read or set a model's timesteps by their name in earlier releases."""
    warnings.warn("`ladder` of a model is now `timesteps`.", DeprecationWarning, stacklevel=2)
    if timesteps:
        (model.timesteps,) = timesteps
    return model.timesteps


class DiffusionModel(ShownModel, nn.Module):
    """The interface of a diffusion model: encode, predict, sample.

    Your own model needs :attr:`network` and :meth:`predict`; :meth:`encode` if it has latents or
    captions; :meth:`sample` and :meth:`condition` to generate queries.

    Attributes:
        network: the module whose parameters are attributed.
        timesteps: all timesteps in the order of sampling, pure noise first, in the model's unit.
        externally_called: names of modules that the network calls outside the block that contains
            them. Only needed to shard the network over processes.
        label_names: names of the classes, in the order of their numbers, if the model was trained
            on text labels; empty if labels are numbers.
        metadata_columns: columns of the examples' metadata that :meth:`encode` reads. Changes in
            these columns make it other data for a store; changes in other columns do not.
    """

    network: nn.Module
    externally_called: Sequence[str] = ()
    label_names: Sequence[str] = ()
    metadata_columns: Sequence[str] = ()
    timesteps: Sequence[float] = range(999, -1, -1)

    ladder: Any = property(_ladder, _ladder)

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Use the attribute ``ladder`` of a class for earlier releases as its timesteps."""
        super().__init_subclass__(**arguments)
        if "ladder" in vars(cls):
            _ladder(cls, vars(cls)["ladder"])
            del cls.ladder

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """Modules that only :meth:`encode` and :meth:`sample` need, by name.

        They are not children of the model. Callers of ``encode`` move them to a device and back.
        """
        return {}

    def encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """Return x0 and the condition of a batch; called once per example.

        Args:
            batch: ``image [batch, C, H, W]`` in [0, 1], for clips ``[batch, C, F, H, W]``; lists
                ``label``, ``caption``, ``id``, ``metadata``, ``sizes``; for data with condition
                images also ``condition_image [batch, C', H', W']`` in [0, 1].

        Returns:
            ``x0 [batch, ...]`` in the model's space (pixels or latents), and the condition.
        """
        return 2 * batch["image"] - 1, {}

    @abstractmethod
    def predict(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """Return the network's prediction for noised examples, its target and weight.

        Args:
            x0: ``[batch, ...]`` from :meth:`encode`.
            noise: standard normal, shape of x0.
            t: timesteps ``[batch]``, in the model's unit.
            condition: from :meth:`encode`.
        """

    @classmethod
    def reads_captions(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether a model loaded with these settings needs captions."""
        return False

    @classmethod
    def reads_condition_images(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether a model loaded with these settings needs condition images."""
        return False

    def unused_at(self, t: float) -> tuple[str, ...]:
        """Return prefixes of the names of parameters that timestep t does not use."""
        return ()

    def for_queries(self) -> Self:
        """Return the model with the loss of queries: itself, unless it differs from training."""
        return self

    def describe_query(self) -> dict[str, Any]:
        """Return how the loss of queries differs from that of training examples, as JSON."""
        return {}

    def condition(self, prompts: Sequence[Any]) -> Condition:
        """Return the condition for sampling from prompts: class labels, or captions."""
        return {}

    def sample(self, prompts: Sequence[Any], seeds: Sequence[int], steps: int) -> Tensor:
        """Generate one image per prompt, each from its own seed.

        Args:
            prompts: class labels or captions.
            seeds: one seed per prompt; an image depends only on its own seed and prompt.
            steps: number of denoising steps.

        Returns:
            ``[len(prompts), C, H, W]`` in [0, 1].
        """
        raise DminError(
            f"{type(self).__name__} cannot generate images. Give queries as image files instead."
        )

    def trajectory(
        self, prompts: Sequence[Any], seeds: Sequence[int], steps: int, states: int
    ) -> Tensor:
        """Return the model's estimates of the clean images during sampling.

        Args:
            prompts: class labels or captions.
            seeds: one seed per prompt.
            steps: number of denoising steps.
            states: number of recorded steps, evenly spaced, including the last.

        Returns:
            ``[states, len(prompts), C, H, W]`` in [0, 1].
        """
        raise DminError(
            f"{type(self).__name__} does not record how images are generated. Set "
            f"queries.trajectory=0; only journey_trak needs it."
        )

    def facts_of_samples(self) -> dict[str, Any]:
        """Return metadata that :meth:`encode` needs for generated images."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Return what defines the loss besides the weights, for the feature fingerprint."""
        return {"model": type(self).__name__}

    def describe_sampling(self) -> dict[str, Any]:
        """Return what generated images depend on besides weights, prompts, seeds and steps."""
        return {"model": type(self).__name__}


Readout = Callable[[Prediction], Tensor]


def expected(readout: Readout) -> Readout:
    """Return a readout's mean over prompt dropout, ``(1 − p) f(given) + p f(dropped)``."""

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
    """Return the training loss of each example, ``[batch]``: the weighted mean over its pixels.

    ``L_b = w_b · mean_p m_bp (prediction_bp − target_bp)²`` with a mask m (or 1), or the model's
    own loss; plus the bound of a learned variance.

    Raises:
        DminError: there is a mask, and the loss is not the squared error of an image.
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
        DminError: the loss is not a plain squared error.
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
    """Return the mean over an example's values, weighted by the mask."""
    mask = prediction.mask
    return (values if mask is None else mask * values).flatten(1).mean(1)


READOUTS: dict[str, Readout] = {
    "loss": per_example_loss,
    "mean_squared_output": mean_squared_output,
    "mean_output": mean_output,
}
"""Functions of a prediction with one value per example, whose gradients can be collected."""


def weights_digest(module: nn.Module) -> str:
    """Return a digest (16 hexadecimal digits) of all weights and buffers, on any device.

    If the weights are sharded over processes, all processes must call this function.
    """
    digest = hashlib.sha256()
    tensors = {plain_name(name): x for name, x in uncompiled(module).state_dict().items()}
    for name, tensor in sorted(tensors.items()):
        if hasattr(tensor, "full_tensor"):  # sharded: digest the whole tensor
            tensor = tensor.full_tensor()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def noise_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return a CPU generator per seed, so that an image does not depend on its batch."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]
