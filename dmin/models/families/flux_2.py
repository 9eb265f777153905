"""FLUX.2: a transformer on packed latents, normalised by the running statistics of its VAE."""

from typing import Any, ClassVar

from torch import Tensor

from dmin.models.base import Condition
from dmin.models.families.flow import GuidanceEmbedded
from dmin.models.relatives import Claims


class Flux2(GuidanceEmbedded):
    """FLUX.2 dev and klein (Black Forest Labs 2025); the network also receives padding tokens."""

    family = "flux_2"
    claims: ClassVar[Claims] = Claims(
        "Flux2Transformer2DModel",
        ("Flux2Pipeline",),
        ("Flux2KleinPipeline",),
        takes={"guidance_embeds": (True,)},
        packing=4,
        keys=("double_blocks.0.", "single_stream_modulation.lin."),
        vae=("AutoencoderKLFlux2",),
    )
    time_unit = "sigma"
    encoding: ClassVar[dict[str, Any]] = {}
    encoded = ("encoder_hidden_states",)

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        text, pipeline = condition["encoder_hidden_states"], self.pipeline
        return {
            "guidance": self._guidance(noised),
            "encoder_hidden_states": text,
            "txt_ids": pipeline._prepare_text_ids(text).to(noised.device),
            "img_ids": pipeline._prepare_latent_ids(noised[:, :, ::2, ::2]).to(noised.device),
        }
