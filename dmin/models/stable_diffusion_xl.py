"""Stable Diffusion XL: a larger UNet that is told the sizes of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from dmin.models.base import Condition
from dmin.models.captioned import Sized
from dmin.models.latent import LatentDenoiser


class StableDiffusionXL(Sized, LatentDenoiser):
    """Stable Diffusion XL (Podell et al. 2023); predicts ε or v."""

    pipeline_class = StableDiffusionXLPipeline
    network_name: ClassVar[str] = "unet"
    components: ClassVar[dict[str, Any]] = {"add_watermarker": False}

    def _embed(self, prompts: Sequence[Any]) -> Condition:
        embedded, _, pooled, _ = self.pipeline.encode_prompt(
            self._texts(prompts), device=self._text_device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embedded, "text_embeds": pooled}

    def _sizes(self, image: Tensor) -> Condition:
        told = self._told(image)
        row = image.new_tensor([*told["original"], *told["crop"], *told["target"]])
        return {"time_ids": row.repeat(len(image), 1)}

    def _predict(self, noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
        prediction: Tensor = self.network(
            noised,
            t,
            encoder_hidden_states=condition["encoder_hidden_states"],
            added_cond_kwargs={k: condition[k] for k in ("text_embeds", "time_ids")},
        ).sample
        return prediction
