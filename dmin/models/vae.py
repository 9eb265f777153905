"""From images to the latents that a diffusion model was trained on."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmin.diffusion.noise import SharedNoise
from dmin.runtime.errors import DminError


def latent_channels(config: Mapping[str, Any]) -> int:
    """Return the latent channels of an autoencoder, from its config."""
    return int(config.get("latent_channels") or config["z_dim"])


def encode(
    vae: Any,
    image: Tensor,
    kind: Literal["mode", "sample"] = "mode",
    seed: int = 0,
    shifted: bool = True,
) -> Tensor:
    """Return scaled latents, computed on the autoencoder's device.

    Args:
        vae: a diffusers autoencoder, variational or plain.
        image: ``[batch, C, H, W]`` in [0, 1] (a single frame for a video autoencoder), or clips
            ``[batch, C, F, H, W]``.
        kind: ``mode`` of the posterior, or ``sample``: a draw with the same noise for all images,
            so that equal images have equal latents.
        seed: key of that noise.
        shifted: as for :func:`scale`.

    Returns:
        ``[batch, latent channels, H / factor, W / factor]``, with the images' dtype and device; for
        clips with an axis of latent frames before height and width.

    Raises:
        DminError: ``sample`` is requested of a plain autoencoder.
    """
    pixels = (2 * image - 1).to(next(vae.parameters()))
    still = of_frames(vae) and pixels.ndim == 4
    encoded = vae.encode(pixels.unsqueeze(2) if still else pixels)
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
        # The key −1 is not a timestep of any diffusion.
        noise = SharedNoise(seed)(posterior.mean.shape[1:], -1.0)
        z = posterior.mean + posterior.std * noise.to(posterior.mean)
    return normalised(vae, (z.squeeze(2) if still else z).to(image), shifted)


def normalised(vae: Any, z: Tensor, shifted: bool = True) -> Tensor:
    """Return the diffusion model's latents for latents of the autoencoder.

    Args:
        vae: the autoencoder. They are normalised by its running statistics over squares of 2 × 2
            latent pixels (``bn``) if it has these, else by the constants of its config.
        z: ``[batch, C, h, w]``, or with frames ``[batch, C, f, h, w]``.
        shifted: as for :func:`scale`.
    """
    if not hasattr(vae, "bn"):
        return scale(z, vae.config, shifted)
    mean, std = _statistics(vae, z)
    return nn.functional.pixel_shuffle((nn.functional.pixel_unshuffle(z, 2) - mean) / std, 2)


def _statistics(vae: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation at each position of a 2 × 2 square, ``[1, 4 C, 1, 1]``."""
    var = vae.bn.running_var + vae.config["batch_norm_eps"]
    return vae.bn.running_mean.view(1, -1, 1, 1).to(z), var.sqrt().view(1, -1, 1, 1).to(z)


def scale(z: Tensor, config: Any, shifted: bool = True) -> Tensor:
    """Return latents with mean about 0 and scale about 1.

    ``(z − shift) · s``, or ``(z − mean) · s / std`` by channel if the config has mean and std
    (some SDXL checkpoints; with s = 1 if it has no s, as for Qwen-Image and Wan).

    Args:
        z: ``[batch, C, ...]``.
        config: config of the autoencoder.
        shifted: whether the family's pipelines use the ``shift_factor``, if there is one.
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        by_channel = (1, -1, *[1] * (z.ndim - 2))
        centre, spread = (torch.tensor(x).to(z).view(by_channel) for x in (mean, std))
        return (z - centre) * (config.get("scaling_factor") or 1.0) / spread
    shift: float = config.get("shift_factor") or 0.0
    factor: float = config["scaling_factor"]
    return (z - shift) * factor if shifted else z * factor


def decode(vae: Any, latents: Tensor, shifted: bool = True) -> Tensor:
    """Return the images or clips of scaled latents, in [0, 1], on the CPU."""
    latents = latents.float()
    if hasattr(vae, "bn"):
        mean, std = _statistics(vae, latents)
        squares = nn.functional.pixel_unshuffle(latents, 2) * std + mean
        z = nn.functional.pixel_shuffle(squares, 2)
    else:
        z = unscale(latents, vae.config, shifted)
    z = z.to(next(vae.parameters()))
    still = of_frames(vae) and z.ndim == 4
    image = vae.decode(z.unsqueeze(2) if still else z).sample
    image = image[:, :, 0] if still else image
    return ((image.float().cpu() + 1) / 2).clamp(0, 1)


def unscale(z: Tensor, config: Any, shifted: bool = True) -> Tensor:
    """Return the autoencoder's latents for scaled ones: the inverse of :func:`scale`."""
    flat = (1, z.shape[1], *[1] * (z.ndim - 2))
    zero, one = (scale(torch.full(flat, x).to(z), config, shifted) for x in (0.0, 1.0))
    return (z - zero) / (one - zero)


def factor(vae: Any) -> int:
    """Return the pixels per latent pixel, in each direction."""
    names = ("block_out_channels", "encoder_block_out_channels", "dim_mult")
    stages = next(vae.config[name] for name in names if vae.config.get(name))
    return int(2 ** (len(stages) - 1))


def frame_step(vae: Any) -> int:
    """Return the frames per latent frame; the first latent frame always stands for one frame."""
    return int(2 ** sum(vae.config.get("temperal_downsample") or ()))  # diffusers' spelling


def latent_sides(vae: Any, sides: Sequence[int]) -> tuple[int, ...]:
    """Return the sides of latents: frames (if any), height, width."""
    *frames, height, width = sides
    unit = factor(vae)
    return *(1 + (n - 1) // frame_step(vae) for n in frames), height // unit, width // unit


def of_frames(vae: Any) -> bool:
    """Return whether an autoencoder is for videos, so that an image is a single frame."""
    return any(isinstance(module, nn.Conv3d) for module in vae.modules())


def check_size(vae: Any, image: Tensor, patch: int, clips: bool, name: str, family: str) -> None:
    """Refuse images or clips whose sides are not multiples of the VAE's factor times the patch."""
    needed = 3 if of_frames(vae) else vae.config["in_channels"]
    unit = factor(vae) * patch
    channels, *frames, height, width = image.shape[1:]
    if frames and not clips:
        raise DminError(
            f"{name!r} is a clip, but {family} is trained on images. Choose a video model "
            f"(model=wan), or images (data=image_folder)."
        )
    check_frames(frames[0] if frames else 1, frame_step(vae), f"clip {name!r}", "data.frames")
    if channels != needed or height % unit or width % unit:
        raise DminError(
            f"image {name!r} is {(channels, height, width)} (channels, height, width), which "
            f"does not fit {family}: {needed} channels are needed, and sides that are multiples of "
            f"{unit}. Set data.size and data.mode."
        )


def check_frames(frames: int, step: int, what: str, setting: str) -> None:
    """Refuse a clip whose number of frames is not ``step`` · n + 1.

    Raises:
        DminError: the message has the nearest allowed numbers.
    """
    if (frames - 1) % step:
        below = frames - (frames - 1) % step
        near = [str(n) for n in (below, below + step) if n > 1]
        raise DminError(
            f"{what} has {frames} frames, but the autoencoder takes {step}n + 1: "
            f"set {setting}={' or '.join(near)}."
        )


def pack(x: Tensor) -> Tensor:
    """Return latents ``[batch, C, h, w]`` as tokens ``[batch, hw/4, 4C]`` of 2 × 2 pixels."""
    batch, channels, height, width = x.shape
    squares = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Return tokens as latents with the height and width of a shape; the inverse of `pack`."""
    height, width = shape[-2:]
    squares = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)
