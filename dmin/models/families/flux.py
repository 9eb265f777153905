"""Flux: a transformer on packed latents, distilled to take its guidance as an input."""

from typing import Any, ClassVar

from torch import Tensor

from dmin.models.base import Condition
from dmin.models.families.flow import GuidanceEmbedded
from dmin.models.relatives import Claims, variants


class Flux(GuidanceEmbedded):
    """Flux.1 dev and schnell (Black Forest Labs 2024)."""

    family = "flux"
    claims: ClassVar[Claims] = Claims(
        "FluxTransformer2DModel",
        variants("Flux")[:2],
        takes={"guidance_embeds": (True,)},
        packing=4,
        keys=("double_blocks.0.",),
    )
    shifted = True
    time_unit = "sigma"
    encoding: ClassVar[dict[str, Any]] = {"prompt_2": None}
    encoded = ("encoder_hidden_states", "pooled_projections")
    made_apart: ClassVar[dict[str, str]] = {"text_encoder_2": "encoder_hidden_states"}

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        text = condition["encoder_hidden_states"]
        ids = self.pipeline._prepare_latent_image_ids(
            0, noised.shape[2] // 2, noised.shape[3] // 2, noised.device, noised.dtype
        )
        positions = {"txt_ids": text.new_zeros(text.shape[1], 3), "img_ids": ids}
        return {"guidance": self._guidance(noised), **positions, **condition}
