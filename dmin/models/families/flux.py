"""Flux: a transformer on packed latents, distilled to take its guidance as an input."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from dmin.diffusion.processes import RectifiedFlow
from dmin.models.base import Condition
from dmin.models.conditioning import LongCaptioned
from dmin.models.relatives import Claims, variants


class Flux(LongCaptioned):
    """Flux.1 dev and schnell (Black Forest Labs 2024).

    Args:
        pipeline: of diffusers, with all its components.
        embedded_guidance: the guidance that the network is told in attribution: what it was
            fine-tuned with. Diffusers' training script takes 3.5 unless told otherwise; models
            without the input (schnell) are not told. ``guidance_scale`` is its value in sampling.
        settings: of the classes above.
    """

    family = "flux"
    claims = Claims(
        "FluxTransformer2DModel",
        variants("Flux")[:2],
        takes={"guidance_embeds": (True,)},
        packing=4,
        keys=("double_blocks.0.",),
    )
    processes = (RectifiedFlow,)
    shifted = True
    time_unit = "sigma"
    own_length: int = 512
    own_size: ClassVar[int] = 128
    encoding: ClassVar[dict[str, Any]] = {"prompt_2": None}
    encoded = ("encoder_hidden_states", "pooled_projections")
    made_apart: ClassVar[dict[str, str]] = {"text_encoder_2": "encoder_hidden_states"}

    def __init__(
        self,
        pipeline: Any,
        *,
        embedded_guidance: float = 3.5,
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, **settings)
        self.embedded_guidance = embedded_guidance

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss."""
        told = self.embedded_guidance if self.network.config.guidance_embeds else None
        return {**super().describe(), "embedded_guidance": told}

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        batch, _, height, width = noised.shape
        guidance, text = None, condition["encoder_hidden_states"]
        if self.network.config.guidance_embeds:
            guidance = noised.new_full((batch,), self.embedded_guidance)
        ids = self.pipeline._prepare_latent_image_ids(
            batch, height // 2, width // 2, noised.device, noised.dtype
        )
        positions = {"txt_ids": text.new_zeros(text.shape[1], 3), "img_ids": ids}
        return {"guidance": guidance, **positions, **condition}
