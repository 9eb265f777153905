"""A small denoiser without convolutions, for images of few pixels.

It trains in seconds, and hundreds of them at once by batched matrix products, for ground
truth by retraining.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from dmin.models.families.ddpm import DDPM
from dmin.models.labels import load_names, save_names
from dmin.runtime.errors import DminError


class FiLMNetwork(ModelMixin, ConfigMixin):
    """Linear layers over all pixels, each scaled and shifted by timestep and class.

    ``h ← SiLU((1 + a_l(c)) · W_l h + b_l(c)) (+ h)`` with an embedding c of timestep and class
    (FiLM, Perez et al. 2018). It is called like diffusers' ``UNet2DModel``.

    Args:
        sample_size: height and width of the images.
        in_channels: channels of the images.
        width: width of the hidden layers.
        depth: number of hidden layers.
        embedding: width of c; even.
        num_class_embeds: number of classes; None for an unconditional model.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 8,
        in_channels: int = 1,
        width: int = 96,
        depth: int = 3,
        embedding: int = 32,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        height, width_ = (sample_size,) * 2 if isinstance(sample_size, int) else sample_size
        pixels = in_channels * height * width_
        self.frequencies = embedding // 2
        self.time = nn.Sequential(
            nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label = None if num_class_embeds is None else nn.Embedding(num_class_embeds, embedding)
        sizes = [pixels] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.films = nn.ModuleList(nn.Linear(embedding, 2 * width) for _ in range(depth))
        self.leave = nn.Linear(width, pixels)

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None
    ) -> UNet2DOutput:
        """Return the prediction for noised images ``[batch, C, H, W]``."""
        c = self.time(self.angles(timestep.to(sample)))
        if self.label is not None:
            c = c + self.label(class_labels)
        c = torch.nn.functional.silu(c)
        h = sample.flatten(1)
        for number, (layer, film) in enumerate(zip(self.layers, self.films, strict=True)):
            scale, shift = film(c).chunk(2, -1)
            new = torch.nn.functional.silu((1 + scale) * layer(h) + shift)
            h = new if number == 0 else h + new
        return UNet2DOutput(sample=self.leave(h).view(sample.shape))

    def angles(self, timestep: Tensor) -> Tensor:
        """Return sines and cosines of timesteps, ``[..., embedding]``."""
        powers = torch.arange(self.frequencies, device=timestep.device) / self.frequencies
        angles = timestep[..., None] * torch.exp(-math.log(10_000) * powers)
        return torch.cat([angles.sin(), angles.cos()], -1)


class MLP(DDPM):
    """A DDPM whose network is a :class:`FiLMNetwork`.

    Args:
        network: the network.
        scheduler: as for :class:`DDPM`.
        snr_gamma: γ of min-SNR weights, the only change of the loss that retraining supports.
    """

    def __init__(self, network: Any, scheduler: Any, snr_gamma: float | None = None) -> None:
        super().__init__(network, scheduler, snr_gamma)

    @classmethod
    def small(
        cls,
        sample_size: int = 8,
        in_channels: int = 1,
        width: int = 96,
        depth: int = 3,
        embedding: int = 32,
        num_class_embeds: int | None = 10,
        **scheduler: Any,
    ) -> Self:
        """Return an untrained model.

        Args:
            sample_size: height and width of the images.
            in_channels: channels of the images.
            width: width of the hidden layers.
            depth: number of hidden layers.
            embedding: width of the embedding of timestep and class; even.
            num_class_embeds: number of classes; None for an unconditional model.
            scheduler: settings of ``DDPMScheduler``; the default schedule is the cosine one.
        """
        network: Any = FiLMNetwork(
            sample_size, in_channels, width, depth, embedding, num_class_embeds
        )
        return cls(network, DDPMScheduler(**{"beta_schedule": "squaredcos_cap_v2", **scheduler}))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | Path, *, snr_gamma: float | None = None
    ) -> Self:
        """Load a model that :meth:`save_pretrained` wrote.

        Args:
            path: folder with ``unet/`` and ``scheduler/``.
            snr_gamma: as for :class:`DDPM`.

        Raises:
            DminError: there is no such checkpoint.
        """
        if not (Path(path) / "unet").is_dir():
            raise DminError(
                f"model.path={path}: there is no saved MLP (no unet/). Train one with `dmin train`."
            )
        try:
            network: Any = FiLMNetwork.from_pretrained(str(Path(path) / "unet"))
            scheduler = DDPMScheduler.from_pretrained(str(Path(path) / "scheduler"))
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            why = " ".join(str(error).split())
            raise DminError(
                f"model.path={path} is no whole MLP ({why}). Train it again."
            ) from error
        found = cls(network.eval(), scheduler, snr_gamma)
        found.label_names = load_names(Path(path), found.classes)
        return found

    def save_pretrained(self, path: str | Path) -> None:
        """Save network and scheduler separately, since no pipeline has this network."""
        network: Any = self.network
        network.save_pretrained(str(Path(path) / "unet"))
        self.scheduler.save_pretrained(str(Path(path) / "scheduler"))
        save_names(self.label_names, Path(path))
