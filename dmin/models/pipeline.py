"""A model that wraps a diffusers pipeline: loading, saving and generating."""

import functools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from dmin.models import logging_filters
from dmin.models.adapters import load_adapters, save_adapters, without_adapters
from dmin.models.adapters.quantised import BaseDType, round_weights
from dmin.models.adapters.words import Embeddings, plain_tokenizers, save_words
from dmin.models.base import noise_generators, weights_digest
from dmin.models.checkpoints import DType, load_pipeline, load_weights
from dmin.models.relatives import check_pipeline, check_whole, kind_in_hand
from dmin.models.trained import TrainedModel, name_settings
from dmin.models.trajectory import recorded, samplable
from dmin.runtime.errors import DminError
from dmin.runtime.transfer import kept_devices


class PipelineModel(TrainedModel):
    """A diffusers pipeline: its network, encoders and sampler.

    Only :attr:`network` is a child module: moving the model moves the network, but not the
    pipeline's :attr:`encoders`.

    Args:
        pipeline: a diffusers pipeline with all its components.
        guidance_scale: guidance in sampling; None for the pipeline's default.
        settings: settings of :class:`~dmin.models.trained.TrainedModel`.
    """

    network_name: ClassVar[str] = "transformer"
    components: ClassVar[dict[str, Any]] = {}  # replaced when loading: objects or functions
    sampled_with: ClassVar[dict[str, Any]] = {}  # settings of the pipeline's call
    given_images: ClassVar[tuple[str, ...]] = ()  # entries of a batch that its sampler takes

    def __init__(self, pipeline: Any, guidance_scale: float | None, **settings: Any) -> None:
        check_pipeline(kind_in_hand(pipeline), self.family, "model")
        there = [name for name, part in pipeline.components.items() if part is not None]
        check_whole(self.family, type(pipeline), there, "the pipeline")
        super().__init__(pipeline.scheduler, **settings)
        self.pipeline = pipeline
        self.network: Any = self._whole(self.networks).eval()
        self.guidance_scale = guidance_scale
        for encoder in self.encoders.values():
            encoder.eval().requires_grad_(False)
        pipeline.set_progress_bar_config(disable=True)
        logging_filters.say_once(pipeline)

    def __init_subclass__(cls) -> None:
        """Give ``from_pretrained`` a signature with all settings of the family."""
        super().__init_subclass__()
        name_settings(cls, PipelineModel, "from_pretrained")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        adapter: str | Path | Sequence[str] | Mapping[str, Any] | None = None,
        embeddings: Embeddings | None = None,
        ema: str | Path | Mapping[str, str] | None = None,
        base_dtype: BaseDType | None = None,
        variant: str | None = None,
        revision: str | None = None,
        torch_dtype: DType = "float32",
        subfolder: str | None = None,
        single_file: str | Path | None = None,
        **settings: Any,
    ) -> Self:
        """Load a checkpoint in diffusers' layout.

        Args:
            path: folder with ``model_index.json``, or name of a repository on the Hub.
            adapter: adapters of network and text encoders: file or folder, or several; a mapping
                by name of the network if there are several networks, as for ``ema``.
            embeddings: learned words (textual inversion): file or ``WORD=FILE``, or several.
            ema: other weights of the network, such as their moving average: ``.safetensors`` file,
                or a folder that the network's or ``EMAModel``'s ``save_pretrained`` wrote.
            base_dtype: type to which the network's weights are rounded, as while the adapter was
                trained: see :func:`~dmin.models.adapters.quantised.round_weights`.
            variant: variant of the weight files, such as ``fp16``.
            revision: branch, tag or commit on the Hub.
            torch_dtype: dtype of all weights; losses are always computed in float32.
            subfolder: folder inside ``path`` with the pipeline.
            single_file: file with weights in the original layout; configs, tokenizers and missing
                components are then read from ``path``.
            settings: settings of the family.

        Raises:
            DminError: there is no such checkpoint, or it does not fit the settings.
        """
        pipeline = load_pipeline(
            cls.family,
            path,
            variant=variant,
            revision=revision,
            torch_dtype=torch_dtype,
            subfolder=subfolder,
            single_file=single_file,
            **cls.components,
        )
        networks = cls.networks_of(pipeline)
        for name, file in _by_network(networks, "ema", ema).items():
            load_weights(networks[name], file)
        if base_dtype is not None:
            for network in networks.values():
                round_weights(network, base_dtype)
        files = _by_network(networks, "adapter", adapter)
        for name, network in networks.items():
            if name in files or embeddings is not None:
                load_adapters(network, files.get(name, []), pipeline, embeddings)
            embeddings = None  # load them only once
        return cls(pipeline, **settings).eval()

    @classmethod
    def of_pipeline(cls, pipeline: Any, **settings: Any) -> Self:
        """Return the model of a pipeline."""
        return cls(pipeline, **settings)

    def save_pretrained(self, path: str | Path) -> None:
        """Save in diffusers' layout, with adapters in the folder ``lora``."""
        path, own = Path(path), dict(self.pipeline.components)
        parts = {name: part for name, part in own.items() if isinstance(part, nn.Module)}
        plain = {name: without_adapters(part) for name, part in parts.items()}
        plain |= plain_tokenizers(self.pipeline)
        self.pipeline.register_modules(**plain)
        self.pipeline.save_pretrained(str(path))
        self.pipeline.register_modules(**{name: own[name] for name in plain})
        for name, network in self.networks.items():
            place = path / "lora" / (name if len(self.networks) > 1 else "")
            if getattr(network, "peft_config", None):  # trained here
                from peft import get_peft_model_state_dict

                named = {f"{name}_lora_layers": get_peft_model_state_dict(network)}
                self.pipeline.save_lora_weights(str(place), **named)
            save_adapters(network, place)
        save_words(self.pipeline, path / "lora" / "words.safetensors")

    @classmethod
    def networks_of(cls, pipeline: Any) -> dict[str, Any]:
        """Return the attributed networks of a pipeline, by their names in it."""
        return {cls.network_name: getattr(pipeline, cls.network_name)}

    @property
    def networks(self) -> dict[str, Any]:
        """The attributed networks, by their names in the pipeline; usually one."""
        return self.networks_of(self.pipeline)

    def _whole(self, networks: Mapping[str, Any]) -> nn.Module:
        """Return one module with all networks."""
        (network,) = networks.values()
        return network

    @property
    def denoiser(self) -> Any:
        """The network without text encoders that are attributed with it."""
        return self.network

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """VAE and text encoders, by name; the caller may move them to a device and back."""
        attributed = [*self.networks.values(), *self.network.children()]
        return {
            name: component
            for name, component in self.pipeline.components.items()
            if isinstance(component, nn.Module) and component not in attributed
        }

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        steps: int = 50,
        given: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Generate with the pipeline and its scheduler, with a random generator per image.

        Args:
            prompts: class labels or captions.
            seeds: one seed per prompt.
            steps: number of denoising steps.
            given: ``image`` and ``condition_image`` as in a batch, for samplers that take images.

        Returns:
            ``[len(prompts), C, H, W]`` in [0, 1]; for clips ``[len(prompts), C, F, H, W]``.
        """
        if self.network_name == "unet" and self.pipeline.scheduler.config.get(
            "use_dynamic_shifting"
        ):
            raise DminError(
                "scheduler.use_dynamic_shifting=true: pipelines of UNets do not pass the image "
                "size that the shift depends on to the scheduler. Set it to false in the "
                "checkpoint's scheduler/scheduler_config.json, with the shift it was sampled with."
            )
        with self._encoders_with_network(), samplable(self.pipeline.scheduler):
            images: Tensor = self.pipeline(
                **self._sampling(prompts),
                **self._shown(given),
                generator=noise_generators(seeds),
                num_inference_steps=steps,
                output_type="pt",
            )[0]
        if images.ndim == 5:  # [batch, frames, ...]; one frame is an image
            images = images[:, 0] if images.shape[1] == 1 else images.transpose(1, 2)
        return images.float().clamp(0, 1)

    @torch.no_grad()
    def trajectory(
        self, prompts: Sequence[Any], seeds: Sequence[int], steps: int, states: int
    ) -> Tensor:
        """Return the pipeline's decoded estimates of the clean latents during sampling."""
        with recorded(self.pipeline.scheduler, states) as kept, self._encoders_with_network():
            last = self.sample(prompts, seeds, steps)
            # With guidance, the states of some pipelines have twice the batch.
            decoded = [self._decoded(state[: len(prompts)], last) for state in kept]
        return torch.stack(decoded).to(last.device)

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
    def _decoded(self, latents: Tensor, images: Tensor) -> Tensor:
        """Return the images of the sampler's latents; ``images`` are the final ones."""

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        """Return the arguments of the pipeline's call except images."""
        scale = self.guidance_scale
        return {**self.sampled_with, **({} if scale is None else {"guidance_scale": scale})}

    def _shown(self, given: Mapping[str, Tensor] | None) -> dict[str, Any]:
        """Return the arguments of the pipeline's call that are images."""
        return {}

    @contextmanager
    def _encoders_with_network(self) -> Iterator[None]:
        """Context in which the encoders are on the network's device."""
        device = next(self.network.parameters()).device
        with kept_devices(self.encoders.values()):
            for encoder in self.encoders.values():
                encoder.to(device)
            yield


def _by_network(networks: Mapping[str, Any], setting: str, given: Any) -> dict[str, Any]:
    """Return a setting by network, from a value for a single network or a mapping.

    Raises:
        DminError: there are several networks and none is named, or a name is unknown.
    """
    if given is None or isinstance(given, Mapping):
        named = dict(given or {})
    else:
        named = {name: given for name in networks} if len(networks) == 1 else {"": given}
    if odd := named.keys() - networks.keys():
        raise DminError(
            f"model.{setting}={given}: {sorted(odd)[0] or 'a file'} matches no network of this "
            f"checkpoint. Say which one it is for: "
            f"model.{setting}={{{': FILE, '.join(networks)}: FILE}}."
        )
    return named
