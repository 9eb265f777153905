"""What latent diffusion models that are conditioned on captions, and on image sizes, share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dmin.errors import DminError
from dmin.models.latent import LatentDiffusion


class Captioned(LatentDiffusion):
    """Conditioned on captions: to be named before :class:`LatentDenoiser` or :class:`LatentFlow`.

    Args:
        pipeline: of diffusers, with all its components.
        empty_captions: ``raise`` an error at a caption of no words, or ``keep`` it: what the model
            knows as the unconditional case.
        sample_size: height and width of generated images in pixels; None for the model's own.
        settings: of the next class.
    """

    own_size: ClassVar[int] = 64  # of sampled latents, where the network's config does not tell

    def __init__(
        self,
        pipeline: Any,
        *args: Any,
        empty_captions: Literal["raise", "keep"] = "raise",
        sample_size: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, *args, **settings)
        if empty_captions not in ("raise", "keep"):
            raise DminError(f"model.empty_captions={empty_captions!r}: allowed are raise and keep.")
        self.empty_captions = empty_captions
        self.sample_size = _pair(sample_size, "sample_size")

    def describe_sampling(self) -> dict[str, Any]:
        """Return sampler, guidance, size and the encoders' digests."""
        return {**super().describe_sampling(), "size": self._generated_size()}

    def _prompts(self, batch: Mapping[str, Any]) -> list[str]:
        for name, caption in zip(batch["id"], batch["caption"], strict=True):
            if caption is None:
                raise DminError(
                    f"example {name!r} has no caption, and {type(self).__name__} is conditioned on "
                    f"captions. Add it to the data (column text of metadata.jsonl)."
                )
            if not caption.strip() and self.empty_captions == "raise":
                raise DminError(
                    f"example {name!r} has an empty caption. Add one, or set "
                    f"model.empty_captions=keep if the model was trained without captions too."
                )
        return list(batch["caption"])

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        height, width = self._generated_size()
        asked = {"prompt": self._texts(prompts), "height": height, "width": width}
        return {**super()._sampling(prompts), **asked}

    def _generated_size(self) -> tuple[int, int]:
        if self.sample_size is not None:
            return self.sample_size
        size = self.network.config.get("sample_size") or self.own_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.vae_factor * height, self.vae_factor * width

    @staticmethod
    def _texts(prompts: Sequence[Any]) -> list[str]:
        wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if wrong:
            raise DminError(f"prompt {wrong[0]!r} is not a text. Give captions in quotes.")
        return list(prompts)

    @property
    def _text_device(self) -> torch.device:
        """Where the text encoders are."""
        encoders = (e for name, e in self.encoders.items() if name.startswith("text_encoder"))
        return next(next(encoder.parameters()).device for encoder in encoders)


class Sized(Captioned):
    """Told the sizes of images, too (micro-conditioning, Podell et al. 2023).

    Args:
        pipeline: of diffusers, with all its components.
        original_size: height and width before resizing; None for those of the image given.
        crop: top and left of the crop.
        target_size: height and width after cropping; None for those of the image given.
        settings: of the next class.
    """

    def __init__(
        self,
        pipeline: Any,
        *args: Any,
        original_size: Sequence[int] | None = None,
        crop: Sequence[int] = (0, 0),
        target_size: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, *args, **settings)
        self.original_size = _pair(original_size, "original_size")
        self.crop = _pair(crop, "crop") or (0, 0)
        self.target_size = _pair(target_size, "target_size")

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss, the sizes told included."""
        sizes = {"original_size": self.original_size, "target_size": self.target_size}
        return {**super().describe(), **sizes, "crop": self.crop}

    def _told(self, image: Tensor) -> dict[str, tuple[int, int]]:
        """Return the sizes that the model is told of images."""
        height, width = image.shape[-2:]
        return {
            "original": self.original_size or (height, width),
            "crop": self.crop,
            "target": self.target_size or (height, width),
        }

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        size = self._generated_size()
        return {
            **super()._sampling(prompts),
            "original_size": self.original_size or size,
            "crops_coords_top_left": self.crop,
            "target_size": self.target_size or size,
        }


def _pair(values: Sequence[int] | None, name: str) -> tuple[int, int] | None:
    if values is None:
        return None
    if len(values) != 2:
        raise DminError(f"model.{name}={list(values)}: give two numbers, such as [512, 512].")
    return int(values[0]), int(values[1])
