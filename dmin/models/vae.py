"""From images to the latents that a diffusion model was trained on."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmin.diffusion.noise import SharedNoise
from dmin.runtime.errors import DminError


def latent_channels(config: Mapping[str, Any]) -> int:
    """Return the channels of an autoencoder's latents, by its config."""
    return int(config.get("latent_channels") or config["z_dim"])


def encode(
    vae: Any,
    image: Tensor,
    kind: Literal["mode", "sample"] = "mode",
    seed: int = 0,
    shifted: bool = True,
) -> Tensor:
    """Return scaled latents, computed where the autoencoder is.

    Args:
        vae: an autoencoder of diffusers, variational or plain.
        image: ``[batch, C, H, W]`` in [0, 1], to one of videos a single frame; or clips
            ``[batch, C, F, H, W]``.
        kind: ``mode`` of the posterior, or ``sample``: mean and deviation with one noise for all
            images, so that equal images have equal latents.
        seed: key of that noise.
        shifted: as for :func:`scale`.

    Returns:
        ``[batch, latent channels, H / factor, W / factor]``, of the images' dtype and device; of
        clips with the latents' frames before height and width.

    Raises:
        DminError: a sample of a plain autoencoder.
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
        # No diffusion has a timestep of −1: a key of its own.
        noise = SharedNoise(seed)(posterior.mean.shape[1:], -1.0)
        z = posterior.mean + posterior.std * noise.to(posterior.mean)
    return normalised(vae, (z.squeeze(2) if still else z).to(image), shifted)


def normalised(vae: Any, z: Tensor, shifted: bool = True) -> Tensor:
    """Return latents as the diffusion model takes them, of those as the autoencoder has them.

    Args:
        vae: by what it has: running statistics of squares of 2 × 2 latents (``bn``), else the
            numbers of its config.
        z: ``[batch, C, h, w]``, or with frames, ``[batch, C, f, h, w]``.
        shifted: as for :func:`scale`.
    """
    if not hasattr(vae, "bn"):
        return scale(z, vae.config, shifted)
    mean, std = _statistics(vae, z)
    return nn.functional.pixel_shuffle((nn.functional.pixel_unshuffle(z, 2) - mean) / std, 2)


def _statistics(vae: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each place in a square of 2 × 2, ``[1, 4 C, 1, 1]``."""
    var = vae.bn.running_var + vae.config["batch_norm_eps"]
    return vae.bn.running_mean.view(1, -1, 1, 1).to(z), var.sqrt().view(1, -1, 1, 1).to(z)


def scale(z: Tensor, config: Any, shifted: bool = True) -> Tensor:
    """Return latents centred and of unit scale.

    ``(z − shift) · s``, or ``(z − mean) · s / std`` by channel where the config has these (some
    checkpoints of SDXL; s is 1 where it has none: Qwen-Image, Wan).

    Args:
        z: ``[batch, C, ...]``.
        config: of the autoencoder.
        shifted: whether the pipelines of the family use a ``shift_factor`` where there is one.
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
    """Return the images, or clips, in [0, 1] of scaled latents, on the CPU."""
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
    """Return latents as the autoencoder has them: the inverse of :func:`scale`."""
    flat = (1, z.shape[1], *[1] * (z.ndim - 2))
    zero, one = (scale(torch.full(flat, x).to(z), config, shifted) for x in (0.0, 1.0))
    return (z - zero) / (one - zero)


def factor(vae: Any) -> int:
    """Return how many pixels one latent pixel stands for, in each direction."""
    names = ("block_out_channels", "encoder_block_out_channels", "dim_mult")
    stages = next(vae.config[name] for name in names if vae.config.get(name))
    return int(2 ** (len(stages) - 1))


def frame_step(vae: Any) -> int:
    """Return how many frames one latent frame stands for, but for the first, which is alone."""
    return int(2 ** sum(vae.config.get("temperal_downsample") or ()))  # as diffusers spells it


def latent_sides(vae: Any, sides: Sequence[int]) -> tuple[int, ...]:
    """Return the sides of latents: frames if there are, height, width."""
    *frames, height, width = sides
    unit = factor(vae)
    return *(1 + (n - 1) // frame_step(vae) for n in frames), height // unit, width // unit


def of_frames(vae: Any) -> bool:
    """Tell whether an autoencoder is one of videos, for which an image is a single frame."""
    return any(isinstance(module, nn.Conv3d) for module in vae.modules())


def check_size(vae: Any, image: Tensor, patch: int, clips: bool, name: str, family: str) -> None:
    """Refuse images, or clips, that a VAE, or a patch of its latents, does not divide."""
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
    """Refuse a clip whose frames are not one and a multiple of a VAE's step.

    Raises:
        DminError: with the nearest that are allowed.
    """
    if (frames - 1) % step:
        below = frames - (frames - 1) % step
        near = [str(n) for n in (below, below + step) if n > 1]
        raise DminError(
            f"{what} has {frames} frames, but the autoencoder takes {step}n + 1: "
            f"set {setting}={' or '.join(near)}."
        )


def pack(x: Tensor) -> Tensor:
    """Return latents ``[batch, C, h, w]`` as tokens ``[batch, hw/4, 4C]``: squares of 2 × 2."""
    batch, channels, height, width = x.shape
    squares = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Return tokens as latents with height and width of a shape: the inverse of :func:`pack`."""
    height, width = shape[-2:]
    squares = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)
