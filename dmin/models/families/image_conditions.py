"""Latent diffusion models with a condition image: an image to edit, a mask, a depth map."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dmin.models import vae
from dmin.models.base import Condition
from dmin.models.latent import LatentDiffusion
from dmin.models.pipeline import PipelineModel
from dmin.runtime.errors import DminError

BESIDE = "beside"
"""Name of the condition with further input channels or tokens of the network."""


class SampledFromImages(LatentDiffusion):
    """A model whose sampler takes images."""

    given_images: ClassVar[tuple[str, ...]] = ("image",)

    def _call(self, images: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for the images of a batch."""
        return {"image": images[self.given_images[-1]]}

    def _shown(self, given: Mapping[str, Tensor] | None) -> dict[str, Any]:
        size = self._generated_size()
        if {tuple(image.shape[2:]) for image in (given or {}).values()} != {size}:
            raise asks_for_images(type(self), f", of {size[0]} × {size[1]} (model.sample_size)")
        return self._call({**(given or {}), "id": ["of the images given"]})


class ImageConditioned(SampledFromImages):
    """Conditioned on each example's condition image, as further channels of the noised latents."""

    given_images: ClassVar[tuple[str, ...]] = ("image", "condition_image")

    @classmethod
    def reads_condition_images(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether examples need condition images."""
        return True

    def encode(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """Return latents and condition, including the channels of the condition image."""
        x0, condition = super().encode(batch)
        return x0, {**condition, BESIDE: self._beside(batch).to(x0)}

    def _beside(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the network's further input channels, ``[batch, C', h, w]``."""
        return self._encoded_image(self._condition_image(batch))

    def _predict(self, noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
        rest = {name: value for name, value in condition.items() if name != BESIDE}
        return super()._predict(torch.cat([noised, condition[BESIDE]], 1), t, rest)

    def _condition_image(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the condition images of a batch, ``[batch, C, H, W]``, of the images' size."""
        found: Tensor | None = batch.get("condition_image")
        if found is None:
            raise lacking(type(self).__name__, batch["id"][0])
        if found.shape[2:] != batch["image"].shape[2:]:
            raise DminError(
                f"the condition image of {batch['id'][0]!r} is {tuple(found.shape[2:])}, the image "
                f"{tuple(batch['image'].shape[2:])} [H, W]. Scale both to the same size."
            )
        return found.to(batch["image"])

    def _grey(self, batch: Mapping[str, Any]) -> Tensor:
        """Return condition images of one channel, ``[batch, 1, H, W]``.

        Raises:
            DminError: one has colours.
        """
        image = self._condition_image(batch)
        if (image != image[:, :1]).any():
            raise DminError(
                f"the condition images of {batch['id'][0]!r} and its batch are in colour, "
                f"but {type(self).__name__} takes grey ones. Set data.condition_image to grey "
                f"images."
            )
        return image[:, :1]

    def _encoded_image(self, image: Tensor, kind: Any = "mode") -> Tensor:
        """Return scaled latents of images in [0, 1]; samples use other noise than those of x0."""
        return vae.encode(self.pipeline.vae, image, kind, self.latent_seed + 1, self.shifted)


class ImageTokens(ImageConditioned):
    """Conditioned on the latents of an image to edit, as tokens after the noised ones."""

    def _predict(self, noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
        told = {self.time_name: self._time(t), **self._told(noised, condition)}
        tokens = torch.cat([self._tokens(noised), self._tokens(told.pop(BESIDE))], 1)
        output = self.denoiser(tokens, **told, return_dict=False)[0]
        return self.sign * self._latents(output, noised.shape)

    def _latents(self, tokens: Any, shape: Sequence[int]) -> Tensor:
        own = shape[-2] * shape[-1] // self.claims.packing
        return super()._latents(tokens[:, :own], shape)


class Inpainting(ImageConditioned):
    """Conditioned on a mask, white where the image is to be filled in, and the masked image.

    Args:
        pipeline: a diffusers pipeline with all its components.
        mask_seed: seed of a random mask, the same for all images of a size (training scripts draw
            a rectangle or an ellipse at each step); None: masks are the condition images.
        settings: settings of :class:`~dmin.models.latent.LatentDiffusion`.
    """

    def __init__(self, pipeline: Any, *, mask_seed: int | None = None, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        self.mask_seed = mask_seed

    @classmethod
    def reads_condition_images(cls, settings: Mapping[str, Any]) -> bool:
        """Return whether examples need masks: not if a random one is used."""
        return settings.get("mask_seed") is None

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss, including the mask's seed."""
        drawn = {} if self.mask_seed is None else {"mask_seed": self.mask_seed}
        return {**super().describe(), **drawn}

    def _mask(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the mask of pixels to fill in, ``[batch, 1, H, W]`` of zeros and ones."""
        image = batch["image"]
        if self.mask_seed is None:
            return (self._grey(batch) >= 0.5).to(image)
        drawn = drawn_mask(image.shape[-2], image.shape[-1], self.mask_seed)
        return drawn.to(image).expand(len(image), 1, -1, -1)

    def _beside(self, batch: Mapping[str, Any]) -> Tensor:
        mask = self._mask(batch)
        grey = torch.full_like(batch["image"], 0.5)  # zero in the range [−1, 1]
        rest = torch.where(mask.bool(), grey, batch["image"])
        latents = self._encoded_image(rest, self.latents)
        return self._ordered(self._mask_of(mask, latents), latents)

    def _mask_of(self, mask: Tensor, latents: Tensor) -> Tensor:
        """Return a mask at the resolution of the latents."""
        return interpolate(mask, size=latents.shape[-2:])

    def _ordered(self, mask: Tensor, latents: Tensor) -> Tensor:
        return torch.cat([mask, latents], 1)

    def _call(self, images: Mapping[str, Any]) -> dict[str, Any]:
        return {"image": images["image"], "mask_image": self._mask(images), "strength": 1.0}


def drawn_mask(height: int, width: int, seed: int) -> Tensor:
    """Return a rectangle or an ellipse of ones with random size and position, ``[1, 1, H, W]``.

    Source: ``random_mask`` of diffusers' ``train_dreambooth_inpaint.py``; an empty mask is drawn
    again.
    """
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.arange(height).view(-1, 1) + 0.5, torch.arange(width) + 0.5
    while True:
        size, place, kind = torch.rand(3, 2, generator=draw).tolist()
        half = size[0] * height / 2, size[1] * width / 2
        # The whole shape is inside the image.
        centre = (h + p * (n - 2 * h) for h, p, n in zip(half, place, (height, width), strict=True))
        off = [abs(at - c) / max(h, 1e-6) for at, c, h in zip((y, x), centre, half, strict=True)]
        inside = torch.maximum(*off) < 1 if kind[0] < 0.5 else off[0] ** 2 + off[1] ** 2 < 1
        if inside.any():
            return inside.float()[None, None]


def asks_for_images(family: type[PipelineModel], size: str = "") -> DminError:
    """Return the error that a model cannot generate from prompts alone, with the remedy."""
    beside = " queries.condition_image=FOLDER" if "condition_image" in family.given_images else ""
    given = ", ".join(f"'{name}': …" for name in family.given_images)
    return DminError(
        f"{family.__name__} generates from images{size}, which only Python can pass to it: "
        f"model.sample(..., given={{{given}}}). Save the results as files, and set queries=images "
        f"queries.root=FOLDER{beside}."
    )


def lacking(model: str, example: str, setting: str = "data") -> DminError:
    """Return the error that an example lacks the condition image that a model needs."""
    return DminError(
        f"example {example!r} has no condition image, which {model} needs for each example: an "
        f"image to edit, a mask, a drawing or a depth map. Set {setting}.condition_image to the "
        f"folder or column that "
        f"has them."
    )
