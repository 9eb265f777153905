"""What latent diffusion models share: a pipeline of diffusers, its encoders and its sampler."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from dmin.errors import DminError
from dmin.models import layers, vae  # noqa: F401  (layers registers gradients)
from dmin.models.base import (
    Condition,
    DiffusionModel,
    Prediction,
    noise_generators,
    weights_digest,
)
from dmin.models.checkpoint import (
    DType,
    describe_adapters,
    load_adapters,
    load_pipeline,
    load_weights,
)
from dmin.models.noising import Denoising, Flow
from dmin.models.settings import name_settings


class LatentDiffusion(DiffusionModel):
    """A diffusion model of the latents of a VAE, held as the pipeline of diffusers it came in.

    Only :attr:`network` is a child module: moving the model moves the network, and the pipeline's
    :attr:`encoders` stay where they are.

    Args:
        pipeline: of diffusers, with all its components.
        process: how latents are noised, and the target.
        latents: ``mode`` of the VAE's posterior, or ``sample``: a draw, the same noise for all
            images, so that equal images keep equal latents.
        latent_seed: key of that draw.
        guidance_scale: of sampling; None for the pipeline's default. Attribution takes the
            conditional prediction alone, as training does (without its prompt dropout).

    Raises:
        DminError: a setting does not fit the pipeline.
    """

    pipeline_class: ClassVar[Any]
    network_name: ClassVar[str] = "transformer"
    components: ClassVar[dict[str, Any]] = {}  # replaced when loading
    packing: ClassVar[int] = 1  # latent pixels in one vector of the network's input
    process: Denoising | Flow

    def __init__(
        self,
        pipeline: Any,
        process: Denoising | Flow,
        *,
        latents: Literal["mode", "sample"] = "mode",
        latent_seed: int = 0,
        guidance_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.network: Any = getattr(pipeline, self.network_name).eval()
        self.process = process
        self.ladder = process.ladder
        if latents not in ("mode", "sample"):
            raise DminError(f"model.latents={latents!r}: allowed are mode and sample.")
        self._check_inputs()
        self.latents = latents
        self.latent_seed = latent_seed
        self.guidance_scale = guidance_scale
        for encoder in self.encoders.values():
            encoder.eval().requires_grad_(False)
        pipeline.set_progress_bar_config(disable=True)

    def __init_subclass__(cls) -> None:
        """Give ``from_pretrained`` a signature that names all settings of the family."""
        super().__init_subclass__()
        name_settings(cls, LatentDiffusion, "from_pretrained")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        adapter: str | Path | Sequence[str] | None = None,
        ema: str | Path | None = None,
        variant: str | None = None,
        revision: str | None = None,
        torch_dtype: DType = "float32",
        subfolder: str | None = None,
        single_file: str | Path | None = None,
        **settings: Any,
    ) -> Self:
        """Load a checkpoint in diffusers' layout.

        Args:
            path: folder with ``model_index.json``, or the name of a repository on the Hub.
            adapter: LoRA weights of the network: file or folder, or several.
            ema: other weights of the network, such as their moving average: ``.safetensors`` file,
                or a folder that the network's or ``EMAModel``'s ``save_pretrained`` wrote.
            variant: of the weight files, such as ``fp16``.
            revision: branch, tag or commit on the Hub.
            torch_dtype: of all weights; losses are computed in float32 whatever it is.
            subfolder: folder inside ``path`` that holds the pipeline.
            single_file: file that holds all weights in the original layout; configs and tokenizers
                are then read from ``path``.
            settings: of the family.

        Raises:
            DminError: no such checkpoint, or it does not fit the settings.
        """
        pipeline = load_pipeline(
            cls.pipeline_class,
            path,
            variant=variant,
            revision=revision,
            torch_dtype=torch_dtype,
            subfolder=subfolder,
            single_file=single_file,
            **cls.components,
        )
        network = getattr(pipeline, cls.network_name)
        if ema is not None:
            load_weights(network, ema)
        if adapter is not None:
            load_adapters(network, adapter, pipeline)
        return cls(pipeline, **settings).eval()

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """VAE and text encoders, by name; the caller may move them to a device and back."""
        return {
            name: component
            for name, component in self.pipeline.components.items()
            if isinstance(component, nn.Module) and component is not self.network
        }

    def encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """Return latents and condition, computed where the encoders are, on the images' device."""
        image = batch["image"]
        self._check_size(image)
        condition = {**self._embed(self._prompts(batch)), **self._sizes(image)}
        x0 = vae.encode(self.pipeline.vae, image, self.latents, self.latent_seed)
        return x0, {k: v.to(image.device) for k, v in condition.items()}

    def condition(self, prompts: Sequence[Any]) -> Condition:
        """Return the part of the condition that comes from prompts, on the network's device."""
        device = next(self.network.parameters()).device
        return {k: v.to(device) for k, v in self._embed(prompts).items()}

    def predict(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """Return the network's prediction for noised latents, its target and weight."""
        noised, target, weight = self.process(x0, noise, t)
        dtype = self.network.dtype
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in condition.items()}
        prediction = self._predict(noised.to(dtype), t, cast)
        if prediction.shape[1] == 2 * x0.shape[1]:  # a learned variance comes after the mean
            prediction = prediction.chunk(2, dim=1)[0]
        return Prediction(prediction.to(x0.dtype), target, weight)

    @torch.no_grad()
    def sample(self, prompts: Sequence[Any], seeds: Sequence[int], steps: int = 50) -> Tensor:
        """Generate by the pipeline itself, with its scheduler and a generator for each image."""
        with self._encoders_with_network():
            images = self.pipeline(
                **self._sampling(prompts),
                generator=noise_generators(seeds),
                num_inference_steps=steps,
                output_type="pt",
            ).images
        return images.float().clamp(0, 1)

    def log_snr(self, timesteps: Sequence[float]) -> list[float]:
        """Return the log signal-to-noise ratio at each timestep."""
        return self.process.log_snr(timesteps)

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss, with a digest of each encoder."""
        draw = {"latent_seed": self.latent_seed} if self.latents == "sample" else {}
        return {
            **super().describe(),
            **self.process.describe(),
            "latents": self.latents,
            **draw,
            "adapters": describe_adapters(self.network),
            "encoders": self._encoder_digests,
        }

    def describe_sampling(self) -> dict[str, Any]:
        """Return sampler, guidance and the encoders' digests."""
        scheduler = self.pipeline.scheduler
        return {
            **super().describe_sampling(),
            "scheduler": {"name": type(scheduler).__name__, "config": repr(scheduler.config)},
            "guidance_scale": self.guidance_scale,
            "encoders": self._encoder_digests,
        }

    @functools.cached_property
    def _encoder_digests(self) -> dict[str, str]:
        return {name: weights_digest(encoder) for name, encoder in self.encoders.items()}

    @abstractmethod
    def _prompts(self, batch: Mapping[str, Any]) -> Sequence[Any]:
        """Return what a batch is conditioned on; checked, so that messages can name the example."""

    @abstractmethod
    def _embed(self, prompts: Sequence[Any]) -> Condition:
        """Return the condition of prompts."""

    @abstractmethod
    def _predict(self, noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the network."""

    def _sizes(self, image: Tensor) -> Condition:
        """Return conditions that come from the images' sizes, one row an image."""
        return {}

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that tell what to generate."""
        scale = self.guidance_scale
        return {} if scale is None else {"guidance_scale": scale}

    @property
    def vae_factor(self) -> int:
        """Pixels that one latent pixel stands for, in each direction."""
        return vae.factor(self.pipeline.vae)

    @property
    def patch(self) -> int:
        """Latent pixels that make one token, in each direction."""
        return self.network.config.get("patch_size") or 1

    def _check_inputs(self) -> None:
        """Refuse relatives of the family that are told more than latents, time and prompt."""
        config, latent = self.network.config, self.pipeline.vae.config["latent_channels"]
        if config["in_channels"] != self.packing * latent or config.get("time_cond_proj_dim"):
            raise DminError(
                f"model.path: this {type(self.network).__name__} takes more than the latents of an "
                f"image ({config['in_channels']} channels for {self.packing * latent}, or its "
                f"guidance), as for inpainting or few-step sampling. dmin attributes text- or "
                f"class-to-image models: give the checkpoint of one."
            )

    def _check_size(self, image: Tensor) -> None:
        config = self.pipeline.vae.config
        unit = self.vae_factor * self.patch
        channels, height, width = image.shape[1:]
        if channels != config["in_channels"] or height % unit or width % unit:
            raise DminError(
                f"images of shape {(channels, height, width)} (channels, height, width) do not fit "
                f"{type(self).__name__}: it takes {config['in_channels']} channels and sides that "
                f"are multiples of {unit}. Set size and mode of the data."
            )

    @contextmanager
    def _encoders_with_network(self) -> Iterator[None]:
        """Have the encoders on the network's device for a while."""
        device = next(self.network.parameters()).device
        places = [(e, next(e.parameters()).device) for e in self.encoders.values()]
        try:
            for encoder, _ in places:
                encoder.to(device)
            yield
        finally:
            for encoder, place in places:
                encoder.to(place)


class LatentDenoiser(LatentDiffusion):
    """A latent diffusion in discrete timesteps that predicts ε, v or x0.

    Args:
        pipeline: of diffusers, with all its components.
        snr_gamma: weighs losses by min-SNR with this γ (Hang et al. 2023), if the model was trained
            so; None for equal weights.
        settings: of :class:`LatentDiffusion`.
    """

    process: Denoising

    def __init__(self, pipeline: Any, *, snr_gamma: float | None = None, **settings: Any) -> None:
        super().__init__(pipeline, Denoising(pipeline.scheduler.config, snr_gamma), **settings)


class LatentFlow(LatentDiffusion):
    """A rectified flow in latents that predicts the velocity ε − x0.

    Args:
        pipeline: of diffusers, with all its components.
        shift: of the ladder towards noise; None for the scheduler's. It moves the timesteps that
            schedules choose from, not the loss at a timestep.
        settings: of :class:`LatentDiffusion`.
    """

    process: Flow

    def __init__(self, pipeline: Any, *, shift: float | None = None, **settings: Any) -> None:
        super().__init__(pipeline, Flow(pipeline.scheduler.config, shift), **settings)
