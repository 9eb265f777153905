"""Stable Diffusion 1.x and 2.x: ``UNet2DConditionModel`` in the latents of a VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import StableDiffusionPipeline

from dmin.models.base import Condition
from dmin.models.conditioning import Captioned
from dmin.models.latent import LatentDenoiser


class StableDiffusion(Captioned, LatentDenoiser):
    """Stable Diffusion 1.x (predicts ε) and 2.x (ε or v) (Rombach et al. 2022).

    The safety checker is not loaded: it would turn queries black.
    """

    pipeline_class = StableDiffusionPipeline
    network_name: ClassVar[str] = "unet"
    components: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
    }

    def _embed(self, prompts: Sequence[Any]) -> Condition:
        embedded, _ = self.pipeline.encode_prompt(
            self._texts(prompts), self._text_device, 1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embedded}
