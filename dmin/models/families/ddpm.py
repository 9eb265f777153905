"""DDPM in pixel space: ``UNet2DModel`` and its scheduler, class-conditional or not."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    SchedulerMixin,
    UNet2DModel,
)
from torch import Tensor

from dmin.diffusion.processes import DiscreteDiffusion
from dmin.models.adapters import load_adapters
from dmin.models.base import (
    Condition,
    Prediction,
    noise_generators,
)
from dmin.models.checkpoints import load_pipeline, load_weights
from dmin.models.contract import check_weights
from dmin.models.labels import class_labels, load_names, save_names
from dmin.models.relatives import ANY, Claims, check_inputs
from dmin.models.schedulers import check_variance
from dmin.models.trained import TrainedModel, name_settings
from dmin.runtime.errors import DminError
from dmin.runtime.transfer import to_device


class DDPM(TrainedModel):
    """A denoising diffusion model of pixels (Ho et al. 2020).

    The scheduler determines process and target: discrete, with Karras' preconditioning, or a flow.

    Args:
        network: predicts from a noised image, a timestep and, if it was built with
            ``num_class_embeds``, a class label.
        scheduler: the scheduler of its training.
        snr_gamma: γ of min-SNR weights of the loss (Hang et al. 2023); None for equal weights.
        sample_size: height and width of images, for a network without a fixed size; None for the
            network's own, or for any size that its levels can halve.
        variance_loss: add the variational bound of a learned variance to the loss.
        settings: settings of :class:`~dmin.models.trained.TrainedModel`.
    """

    family = "ddpm"
    claims: ClassVar[Claims] = Claims(
        "UNet2DModel",
        ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline"),
        takes={"num_class_embeds": ANY},
    )

    def __init__(
        self,
        network: UNet2DModel,
        scheduler: SchedulerMixin,
        snr_gamma: float | None = None,
        *,
        sample_size: Sequence[int] | None = None,
        variance_loss: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(scheduler, snr_gamma=snr_gamma, **settings)
        check_weights(network)
        check_inputs("ddpm", type(network), network.config, None)
        self.network: UNet2DModel = network
        self.scheduler: Any = scheduler
        config: Any = network.config
        self.classes: int | None = config.num_class_embeds
        size = config.sample_size if sample_size is None else sample_size
        height, width = (size, size) if isinstance(size, int | None) else size
        self.shape: Any = (config.in_channels, height, width)
        self.variance_loss = variance_loss
        check_variance(variance_loss, network, self.process)

    @classmethod
    def build(cls, network: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Self:
        """Return an untrained model from the configs of ``UNet2DModel`` and ``DDPMScheduler``.

        Raises:
            DminError: diffusers refuses a setting.
        """
        _known(UNet2DModel, network, "network")
        _known(DDPMScheduler, scheduler, "scheduler")
        try:
            return cls(UNet2DModel(**network), DDPMScheduler(**scheduler))
        except (ValueError, TypeError) as error:
            raise DminError(
                f"diffusers cannot build a UNet2DModel from network: {error}"
            ) from error

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        adapter: str | Path | Sequence[str] | None = None,
        ema: str | Path | None = None,
        **settings: Any,
    ) -> Self:
        """Load a checkpoint saved in the layout of diffusers' ``DDPMPipeline``.

        Args:
            path: folder with ``model_index.json``, ``unet/`` and ``scheduler/``.
            adapter: adapters of the UNet: file or folder, or several.
            ema: other weights of the UNet, such as their moving average: ``.safetensors`` file, or
                a folder that ``EMAModel.save_pretrained`` wrote.
            settings: settings of the class.

        Raises:
            DminError: there is no such checkpoint.
        """
        if not (Path(path) / "model_index.json").is_file():
            raise DminError(
                f"model.path={path}: there is no diffusers checkpoint (no model_index.json). Train "
                f"one with `dmin train`, or give the folder of a saved DDPMPipeline."
            )
        pipeline = load_pipeline("ddpm", path)
        if ema is not None:
            load_weights(pipeline.unet, ema)
        if adapter is not None:
            load_adapters(pipeline.unet, adapter)
        found = cls(pipeline.unet.eval(), pipeline.scheduler, **settings)
        found.label_names = load_names(Path(path), found.classes)
        return found

    @classmethod
    def of_pipeline(cls, pipeline: Any, **settings: Any) -> Self:
        """Return the model of a pipeline."""
        return cls(pipeline.unet, pipeline.scheduler, **settings)

    def save_pretrained(self, path: str | Path) -> None:
        """Save in the layout of diffusers' ``DDPMPipeline``."""
        pipeline: Any = DDPMPipeline(self.network, self.scheduler)
        pipeline.save_pretrained(str(path))
        save_names(self.label_names, Path(path))

    def encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """Return images scaled from [0, 1] to [−1, 1], and class labels."""
        image = batch["image"]
        channels, height, _ = self.shape
        if height is None:
            self._check_open(image, batch["id"][0])
        elif tuple(image.shape[1:]) != self.shape:
            raise DminError(
                f"image {batch['id'][0]!r} is {tuple(image.shape[1:])} (channels, height, width), "
                f"which does not fit a model of {self.shape}. Set data.size={height} "
                f"data.mode={'L' if channels == 1 else 'RGB'}."
            )
        labels = batch["label"]
        if self.label_names:  # without a label, a prompt is the name of a class
            pairs = zip(labels, batch["caption"], strict=True)
            labels = [caption if label is None else label for label, caption in pairs]
        return 2 * image - 1, self.condition(labels)

    def _check_open(self, image: Tensor, name: str) -> None:
        """Refuse images whose sides cannot be halved at each level of the network."""
        unit = 2 ** (len(self.network.config.block_out_channels) - 1)
        channels, height, width = image.shape[1:]
        if channels != self.shape[0] or height % unit or width % unit:
            raise DminError(
                f"image {name!r} is {(channels, height, width)} (channels, height, width), where "
                f"this model takes {self.shape[0]} channels and sides that are multiples of "
                f"{unit}. Set data.size and data.mode."
            )

    def condition(self, prompts: Sequence[Any]) -> Condition:
        """Return the class labels as a tensor, or nothing for an unconditional model."""
        if self.classes is None:
            return {}
        device = next(self.network.parameters()).device
        labels = class_labels(prompts, self.classes, self.label_names)
        return {"class_labels": to_device(labels, device)}

    def predict(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """Return the network's prediction and the target of the scheduler's prediction type."""
        noised = self.process(x0, noise, t)
        prediction, variance = self._output(noised.sample, t, condition)
        bound = None
        if self.variance_loss and variance is not None:
            bound = self.process.variance_bound(x0, noised.sample, t, prediction, variance)
        return self._judged(noised, t, prediction, bound)

    def _output(
        self, noised: Tensor, t: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor | None]:
        """Return the network's output for the image, and for a learned variance, if any."""
        told = self.process.network_input(noised, t).to(self.network.dtype)
        output = self.network(told, self.process.time(t), **condition).sample.to(noised.dtype)
        mean, *variance = output.split(noised.shape[1], dim=1)
        return mean, variance[0] if variance else None

    def sample(self, prompts: Sequence[Any], seeds: Sequence[int], steps: int = 100) -> Tensor:
        """Generate deterministically from the seed by DDIM (Song et al. 2021), η = 0, or Euler."""
        for x, _ in self._denoised(prompts, seeds, steps):
            last = x
        return ((last + 1) / 2).clamp(0, 1)

    def trajectory(
        self, prompts: Sequence[Any], seeds: Sequence[int], steps: int, states: int
    ) -> Tensor:
        """Return the estimates of x0 during sampling; see the base class."""
        chosen = {steps - 1 - number * steps // states for number in range(states)}
        walk = enumerate(self._denoised(prompts, seeds, steps))
        kept = [estimate for number, (_, estimate) in walk if number in chosen]
        return ((torch.stack(kept) + 1) / 2).clamp(0, 1)

    @torch.no_grad()
    def _denoised(
        self, prompts: Sequence[Any], seeds: Sequence[int], steps: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the state after each step, and the estimate of x0 used in that step."""
        if self.shape[1] is None:
            raise DminError(
                "this UNet2DModel has no sample_size, so the size of generated images is unknown. "
                "Set model.sample_size=[HEIGHT,WIDTH]."
            )
        condition, process = self.condition(prompts), self.process
        device = next(self.network.parameters()).device
        start = [torch.randn(self.shape, generator=g) for g in noise_generators(seeds)]
        x = torch.stack(start).to(device)
        if isinstance(process, DiscreteDiffusion):
            scheduler = DDIMScheduler.from_config(self.scheduler.config)
            scheduler.alphas_cumprod = process.alphas_cumprod
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                step = scheduler.step(self._output(x, t.to(device), condition)[0], t, x)
                x = step.prev_sample
                yield x, step.pred_original_sample
            return
        places = torch.linspace(0, len(process.timesteps) - 1, steps).long()
        chosen = [torch.tensor(process.timesteps[place], device=device) for place in places]
        x = process.levels(chosen[0], x).sigma * x
        for t, after in zip(chosen, [*chosen[1:], None], strict=True):  # Euler's steps
            levels = process.levels(t, x)
            x0 = process.x0(levels, x, self._output(x, t, condition)[0])
            if after is None:
                yield x0, x0
                return
            noise, to = (x - levels.alpha * x0) / levels.sigma, process.levels(after, x)
            x = to.alpha * x0 + to.sigma * noise
            yield x, x0

    def describe(self) -> dict[str, Any]:
        """Return the loss, and the names of classes if labels are text."""
        found = {**super().describe(), **({"variance_loss": True} if self.variance_loss else {})}
        return {**found, **({"classes": list(self.label_names)} if self.label_names else {})}


def _known(target: type, settings: Mapping[str, Any], name: str) -> None:
    """Refuse misspelt settings, some of which diffusers' constructors would ignore."""
    allowed = set(inspect.signature(target).parameters)
    for key in settings:
        if key not in allowed:
            raise DminError(
                f"{name}.{key}: {target.__name__} does not have this setting. It has: "
                f"{', '.join(sorted(allowed))}."
            )


name_settings(DDPM, DDPM, "from_pretrained")
