"""Latent diffusion models: latents, conditions and the loss at a timestep of their process."""

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from dmin.diffusion.process import Process
from dmin.diffusion.processes import DiscreteDiffusion
from dmin.models import normalization, vae  # noqa: F401 (gradients of diffusers' own norms)
from dmin.models.base import Condition, Dropped, Prediction
from dmin.models.contract import check_weights
from dmin.models.pipeline import PipelineModel
from dmin.models.relatives import check_component, check_inputs
from dmin.models.schedulers import check_variance, diffusers_name
from dmin.runtime.errors import DminError

DROPPED = "dropped."  # name prefix of conditions without the prompt


class LatentDiffusion(PipelineModel):
    """A diffusion model of the latents of a VAE.

    Args:
        pipeline: a diffusers pipeline with all its components.
        latents: ``mode`` of the VAE's posterior, or ``sample``: a draw with the same noise for all
            images, so that equal images have equal latents.
        latent_seed: key of that noise.
        prompt_dropout: p, the fraction of training steps without prompt. The loss is the mean over
            both cases, ``(1 − p) L(prompt) + p L(no prompt)``, at twice the cost; with p = 0 the
            prompt is always used, with p = 1 never.
        guidance_scale: guidance in sampling; None for the pipeline's default.
        query_guidance: w, for queries only. None: a query has the loss of a training example. A
            number: it has the loss of the guided prediction ``∅ + w (c − ∅)`` that the sampler
            uses, at twice the cost. Training examples have no guidance, as in training.
        query_without: c⁻, a prompt (or class) with which queries are contrasted. A query's loss is
            ``‖sg[ε(c) + (ε(c) − ε(c⁻))] − ε(c)‖²`` with stop-gradient sg; its gradient increases
            the difference of the predictions for the two prompts (the utility part of
            Concept-TRAK, arXiv 2507.06547; its factor λ cancels in normalised rows). At twice the
            cost.
        settings: settings of :class:`~dmin.models.trained.TrainedModel`.

    Raises:
        DminError: a setting does not fit the pipeline.
    """

    processes: ClassVar[tuple[type[Process], ...]] = (DiscreteDiffusion,)
    shifted: ClassVar[bool] = False  # its pipelines use the autoencoder's shift_factor
    own_size: ClassVar[int] = 64  # side of sampled latents, if the network's config has none
    of_frames: ClassVar[bool] = False  # its network takes frames; an image is a single frame
    sample_frames: int = 1
    # Call of the network: the name of its time argument, the unit of that (the timestep, σ, or the
    # signal 1 − σ), and the sign by which the output becomes the target of the process.
    time_name: ClassVar[str] = "timestep"
    time_unit: ClassVar[Literal["timestep", "sigma", "signal"]] = "timestep"
    sign: ClassVar[int] = 1

    def __init__(
        self,
        pipeline: Any,
        *,
        latents: Literal["mode", "sample"] = "mode",
        latent_seed: int = 0,
        prompt_dropout: float = 0.0,
        guidance_scale: float | None = None,
        query_guidance: float | None = None,
        query_without: str | int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, guidance_scale, **settings)
        if latents not in ("mode", "sample"):
            raise DminError(f"model.latents={latents!r}: allowed are mode and sample.")
        if not 0 <= prompt_dropout <= 1:
            raise DminError(
                f"model.prompt_dropout={prompt_dropout}: give a share of the training steps, from "
                f"0 (the prompt is always given) to 1 (never); 0.1 is usual."
            )
        if query_guidance is not None and query_without is not None:
            raise DminError(
                f"model.query_guidance={query_guidance:g} and model.query_without="
                f"{query_without!r} are two different losses of a query. Set one of them to null."
            )
        check_weights(self.network)
        check_component("vae", diffusers_name(pipeline.vae), self.family, "model")
        channels = vae.latent_channels(pipeline.vae.config)
        for network in self.networks.values():
            check_inputs(self.family, type(network), network.config, channels)
        self.latents = latents
        self.latent_seed = latent_seed
        self.prompt_dropout = prompt_dropout
        self.query_guidance = query_guidance
        self.query_without = query_without
        self.guidance: float | None = None
        self.without: str | int | None = None

    def encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """Return latents and condition, computed on the encoders' device, on the images' device."""
        image = batch["image"]
        told = self.patch, self.of_frames, batch["id"][0], type(self).__name__
        vae.check_size(self.pipeline.vae, image, *told)
        if "condition_image" in batch and not self.reads_condition_images({}):
            raise DminError(
                f"{type(self).__name__} takes no condition images. Set data.condition_image=null."
            )
        condition = {**self._prompted(batch), **self._sizes(batch)}
        x0 = vae.encode(self.pipeline.vae, image, self.latents, self.latent_seed, self.shifted)
        return x0, {k: v.to(image.device) for k, v in condition.items()}

    def _prompted(self, batch: Mapping[str, Any]) -> Condition:
        """Return the conditions for prompts and, where needed, for no prompt."""
        guided = self.guidance is not None or self.without is not None
        with_prompt = guided or self.prompt_dropout < 1
        given = self._embedded(self._prompts(batch)) if with_prompt else {}
        if not guided and self.prompt_dropout == 0:
            return given
        count, prefix = len(batch["image"]), DROPPED if with_prompt else ""
        if self.without is not None and self.without in self._prompts(batch):
            raise DminError(
                f"model.query_without={self.without!r} equals the prompt of a query, so there "
                f"is no difference. Give another prompt (--without)."
            )
        without = self._embedded(None if self.without is None else [self.without])
        nothing = {
            f"{prefix}{name}": value.expand(count, *value.shape[1:]).contiguous()
            for name, value in without.items()
        }
        return {**given, **nothing}

    def for_queries(self) -> Self:
        """Return the model with the loss of queries; it shares the network."""
        if not self.describe_query():
            return self
        asked = copy.copy(self)
        asked.guidance, asked.without = self.query_guidance, self.query_without
        return asked

    def describe_query(self) -> dict[str, Any]:
        """Return the guidance of queries, or the prompt with which they are contrasted."""
        found = {"guidance": self.query_guidance, "without": self.query_without}
        return {name: value for name, value in found.items() if value is not None}

    def condition(self, prompts: Sequence[Any]) -> Condition:
        """Return the part of the condition that depends on prompts, on the network's device."""
        device = next(self.network.parameters()).device
        return {k: v.to(device) for k, v in self._embedded(prompts).items()}

    def predict(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """Return the network's prediction for noised latents, its target and weight."""
        noised = self.process(x0, noise, t)
        told, time = self.process.network_input(noised.sample, t), self.process.time(t)
        dtype = self.network.dtype
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in condition.items()}
        given = {k: v for k, v in cast.items() if not k.startswith(DROPPED)}
        nothing = {k.removeprefix(DROPPED): v for k, v in cast.items() if k.startswith(DROPPED)}

        def predicted(condition: Condition) -> Prediction:
            output = self._predict(told.to(dtype), time, condition).to(x0.dtype)
            # A learned variance follows the mean.
            mean, *variance = output.split(x0.shape[1], dim=1)
            bound = self._bound(x0, noised.sample, t, mean, variance[0]) if variance else None
            return self._judged(noised, t, mean, bound)

        found = predicted(given)
        if not nothing:
            return found
        other = predicted({**given, **nothing})
        if self.without is not None:
            target = (2 * found.prediction - other.prediction).detach()
            return Prediction(found.prediction, target, torch.ones_like(found.weight))
        if self.guidance is None:
            return found._replace(dropped=Dropped(self.prompt_dropout, other))
        step = self.guidance * (found.prediction - other.prediction)
        return self._judged(noised, t, other.prediction + step)

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss, with a digest of each encoder."""
        draw = {"latent_seed": self.latent_seed} if self.latents == "sample" else {}
        dropout = {"prompt_dropout": self.prompt_dropout} if self.prompt_dropout else {}
        return {
            **super().describe(),
            "latents": self.latents,
            **draw,
            **dropout,
            "encoders": self._encoder_digests,
        }

    def _embedded(self, prompts: Sequence[Any] | None) -> Condition:
        """Return the stored condition of prompts, or of no prompt (None)."""
        return self._no_prompt() if prompts is None else self._embed(prompts)

    @abstractmethod
    def _prompts(self, batch: Mapping[str, Any]) -> Sequence[Any]:
        """Return the checked prompts of a batch; messages name the example."""

    @abstractmethod
    def _embed(self, prompts: Sequence[Any]) -> Condition:
        """Return the condition of prompts."""

    def _no_prompt(self) -> Condition:
        """Return the unconditional condition of guidance, one row."""
        return self._embed([""])

    def _bound(
        self, x0: Tensor, noised: Tensor, t: Tensor, mean: Tensor, variance: Tensor
    ) -> Tensor | None:
        """Return the term of the loss for a learned variance, if any, ``[batch]``."""
        return None

    def _predict(self, noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the network; t is in the unit of the process."""
        told = {self.time_name: self._time(t), **self._told(noised, condition)}
        output = self.denoiser(self._tokens(noised), **told, return_dict=False)[0]
        return self.sign * self._latents(output, noised.shape)

    def _time(self, t: Tensor) -> Tensor:
        """Return timesteps in the unit of the network, ``[batch]``."""
        if self.time_unit == "sigma":
            return t.to(self.network.dtype) / self.process.num
        return t if self.time_unit == "timestep" else 1 - t / self.process.num

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        """Return the network's other arguments."""
        return dict(condition)

    def _tokens(self, latents: Tensor) -> Any:
        """Return latents ``[batch, C, h, w]``, or with frames, in the network's input format."""
        if self.of_frames and latents.ndim == 4:
            return latents.unsqueeze(2)
        return vae.pack(latents) if self.claims.packing > 1 else latents

    def _latents(self, tokens: Any, shape: Sequence[int]) -> Tensor:
        """Return latents of a shape from the network's input or output format."""
        if self.of_frames and len(shape) == 4:
            return tokens.squeeze(2)
        return vae.unpack(tokens, shape) if self.claims.packing > 1 else tokens

    def _sizes(self, batch: Mapping[str, Any]) -> Condition:
        """Return conditions that depend on the images' sizes, one row per image."""
        return {}

    @property
    def vae_factor(self) -> int:
        """Pixels per latent pixel, in each direction."""
        return vae.factor(self.pipeline.vae)

    @property
    def patch(self) -> int:
        """Latent pixels per token, in each direction."""
        if self.claims.packing > 1:
            return math.isqrt(self.claims.packing)
        size = self.network.config.get("patch_size") or 1
        return int(size if isinstance(size, int) else size[-1])

    def _generated_size(self) -> tuple[int, int]:
        """Return height and width of generated images."""
        size = self.network.config.get("sample_size") or self.own_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.vae_factor * height, self.vae_factor * width

    def _decoded(self, latents: Tensor, images: Tensor) -> Tensor:
        sides = vae.latent_sides(self.pipeline.vae, images.shape[2:])
        found = self._latents(latents, (len(latents), 1, *sides))
        return vae.decode(self.pipeline.vae, found, self.shifted)


class LearnedVariance(LatentDiffusion):
    """A denoiser that predicts the variance of its steps as well (Nichol & Dhariwal 2021).

    Args:
        pipeline: a diffusers pipeline with all its components.
        variance_loss: add the variational bound that trains the variance, as in the published
            training code; if False, the loss is that of the mean, as in most fine-tuning.
        settings: settings of :class:`LatentDiffusion`.
    """

    def __init__(self, pipeline: Any, *, variance_loss: bool = False, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        check_variance(variance_loss, self.network, self.process)
        self.variance_loss = variance_loss

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss."""
        return {**super().describe(), **({"variance_loss": True} if self.variance_loss else {})}

    def _bound(
        self, x0: Tensor, noised: Tensor, t: Tensor, mean: Tensor, variance: Tensor
    ) -> Tensor | None:
        if not self.variance_loss:
            return None
        return self.process.variance_bound(x0, noised, t, mean, variance)
