"""From images to the latents that a diffusion model was trained on."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dmin.diffusion.noise import SharedNoise
from dmin.runtime.errors import DminError


def encode(
    vae: Any, image: Tensor, kind: Literal["mode", "sample"] = "mode", seed: int = 0
) -> Tensor:
    """Return scaled latents, computed where the autoencoder is.

    Args:
        vae: an autoencoder of diffusers, variational or plain.
        image: ``[batch, C, H, W]`` in [0, 1].
        kind: ``mode`` of the posterior, or ``sample``: mean and deviation with one noise for all
            images, so that equal images have equal latents.
        seed: key of that noise.

    Returns:
        ``[batch, latent channels, H / factor, W / factor]``, of the images' dtype and device.

    Raises:
        DminError: a sample of a plain autoencoder.
    """
    encoded = vae.encode((2 * image - 1).to(next(vae.parameters())))
    if not hasattr(encoded, "latent_dist"):
        if kind == "sample":
            raise DminError(
                f"model.latents=sample: {type(vae).__name__} has no posterior to draw from. Set "
                f"model.latents=mode."
            )
        z = encoded.latent
    elif kind == "mode":
        z = encoded.latent_dist.mode()
    else:
        posterior = encoded.latent_dist
        # No diffusion has a timestep of −1: a key of its own.
        noise = SharedNoise(seed)(posterior.mean.shape[1:], -1.0)
        z = posterior.mean + posterior.std * noise.to(posterior.mean)
    return scale(z.to(image), vae.config)


def scale(z: Tensor, config: Any) -> Tensor:
    """Return latents as the diffusion model takes them: centred and of unit scale.

    ``(z − shift) · s``, or ``(z − mean) · s / std`` by channel where the config has these (some
    checkpoints of SDXL).
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    factor: float = config["scaling_factor"]
    if mean is not None and std is not None:
        centre, spread = (torch.tensor(x).to(z).view(1, -1, 1, 1) for x in (mean, std))
        return (z - centre) * factor / spread
    shift: float = config.get("shift_factor") or 0.0
    return (z - shift) * factor


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Return the images ``[batch, C, H, W]`` in [0, 1] of scaled latents, on the CPU."""
    image = vae.decode(unscale(latents.float(), vae.config).to(next(vae.parameters()))).sample
    return ((image.float().cpu() + 1) / 2).clamp(0, 1)


def unscale(z: Tensor, config: Any) -> Tensor:
    """Return latents as the autoencoder has them: the inverse of :func:`scale`."""
    zero, one = (scale(torch.full((1, z.shape[1], 1, 1), x).to(z), config) for x in (0.0, 1.0))
    return (z - zero) / (one - zero)


def factor(vae: Any) -> int:
    """Return how many pixels one latent pixel stands for, in each direction."""
    stages = vae.config.get("block_out_channels") or vae.config["encoder_block_out_channels"]
    return int(2 ** (len(stages) - 1))
