"""FLUX.2: a transformer on packed latents, normalised by the running statistics of its VAE."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from dmin.diffusion.processes import RectifiedFlow
from dmin.models.base import Condition
from dmin.models.conditioning import LongCaptioned
from dmin.models.relatives import Claims


class Flux2(LongCaptioned):
    """FLUX.2 dev and klein (Black Forest Labs 2025); the network sees the caption's padding.

    Args:
        pipeline: of diffusers, with all its components.
        embedded_guidance: that the network of dev is told in attribution, as for Flux.1; that of
            klein has no such input.
        settings: of the classes above.
    """

    family = "flux_2"
    claims = Claims(
        "Flux2Transformer2DModel",
        ("Flux2Pipeline",),
        ("Flux2KleinPipeline",),
        takes={"guidance_embeds": (True,)},
        packing=4,
        keys=("double_blocks.0.", "single_stream_modulation.lin."),
        vae=("AutoencoderKLFlux2",),
    )
    processes = (RectifiedFlow,)
    time_unit = "sigma"
    own_length: int = 512
    own_size: ClassVar[int] = 128
    encoding: ClassVar[dict[str, Any]] = {}
    encoded = ("encoder_hidden_states",)

    def __init__(self, pipeline: Any, *, embedded_guidance: float = 3.5, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        self.embedded_guidance = embedded_guidance

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss."""
        told = self.embedded_guidance if self.network.config.guidance_embeds else None
        return {**super().describe(), "embedded_guidance": told}

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        text, pipeline = condition["encoder_hidden_states"], self.pipeline
        guidance = noised.new_full((len(noised),), self.embedded_guidance)
        return {
            "guidance": guidance if self.network.config.guidance_embeds else None,
            "encoder_hidden_states": text,
            "txt_ids": pipeline._prepare_text_ids(text).to(noised.device),
            "img_ids": pipeline._prepare_latent_ids(noised[:, :, ::2, ::2]).to(noised.device),
        }
