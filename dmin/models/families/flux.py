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
    own_length: int = 512
    own_size: ClassVar[int] = 128
    encoding: ClassVar[dict[str, Any]] = {"prompt_2": None}
    encoded = ("encoder_hidden_states", "pooled_projections")

    def __init__(
        self,
        pipeline: Any,
        *,
        embedded_guidance: float = 3.5,
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, **settings)
        self.embedded_guidance = embedded_guidance

    @property
    def patch(self) -> int:
        """Latent pixels that make one token: the pipeline packs squares of two."""
        return 2

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss."""
        told = self.embedded_guidance if self.network.config.guidance_embeds else None
        return {**super().describe(), "embedded_guidance": told}

    def _predict(self, noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
        batch, channels, height, width = noised.shape
        pipeline, guidance = self.pipeline, None
        if self.network.config.guidance_embeds:
            guidance = t.new_full((batch,), self.embedded_guidance, dtype=noised.dtype)
        text = condition["encoder_hidden_states"]
        prediction = self.network(
            hidden_states=pipeline._pack_latents(noised, batch, channels, height, width),
            timestep=t.to(noised.dtype) / self.process.num,
            guidance=guidance,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=pipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, noised.device, noised.dtype
            ),
            **condition,
        ).sample
        return pipeline._unpack_latents(prediction, height, width, 1)

    def _unpacked(self, latents: Tensor, images: Tensor) -> Tensor:
        size = images.shape[-2:]
        return self.pipeline._unpack_latents(latents, *size, self.vae_factor)
