"""Wan 2.1: a video transformer; an image is a video of one frame."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from dmin.models.families.flow import Flow
from dmin.models.relatives import Claims
from dmin.runtime.errors import DminError


class Wan(Flow):
    """Wan 2.1 text to video (Wan team 2025), of images as its training takes them."""

    family = "wan"
    claims: ClassVar[Claims] = Claims(
        "WanTransformer3DModel",
        ("WanPipeline",),
        keys=("head.modulation", "patch_embedding."),
        vae=("AutoencoderKLWan",),
    )
    encoded = ("encoder_hidden_states",)
    sampled_with: ClassVar[dict[str, Any]] = {"num_frames": 1}

    def __init__(self, pipeline: Any, **settings: Any) -> None:
        if getattr(pipeline, "transformer_2", None) or pipeline.config.get("expand_timesteps"):
            raise DminError(
                "model.path: a Wan 2.2, which has two networks (one for each end of the timesteps) "
                "or a time for every token. Give a checkpoint of Wan 2.1."
            )
        super().__init__(pipeline, **settings)

    def _tokens(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(2)

    def _latents(self, tokens: Any, shape: Any) -> Tensor:
        found: Tensor = tokens.squeeze(2)
        return found
