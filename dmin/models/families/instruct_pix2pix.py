"""InstructPix2Pix: networks that take the latents of an image to edit."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dmin.diffusion.processes import DiscreteDiffusion
from dmin.models import vae
from dmin.models.base import Condition
from dmin.models.families.image_conditions import ImageConditioned
from dmin.models.families.stable_diffusion import StableDiffusion
from dmin.models.families.stable_diffusion_xl import StableDiffusionXL


class Edited(ImageConditioned):
    """Conditioned on the latents of an image to edit, without the scale factor."""

    def _beside(self, batch: Mapping[str, Any]) -> Tensor:
        return vae.unscale(super()._beside(batch), self.pipeline.vae.config, self.shifted)


class InstructPix2Pix(StableDiffusion, Edited):
    """InstructPix2Pix (Brooks et al. 2023): an image to edit, and an instruction as caption."""

    family = "instruct_pix2pix"
    claims = StableDiffusion.claims._replace(
        pipelines=("StableDiffusionInstructPix2PixPipeline",), beside=(1, 0)
    )

    def _encode(self, prompts: Sequence[Any], **told: Any) -> Condition:
        texts, device = self._texts(prompts), self._text_device
        return {"encoder_hidden_states": self.pipeline._encode_prompt(texts, device, 1, False)}

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        asked = super()._sampling(prompts)  # the image determines the size
        return {name: asked[name] for name in asked if name not in ("height", "width")}


class InstructPix2PixXL(StableDiffusionXL, Edited):
    """The same for Stable Diffusion XL; not CosXL-Edit (EDM), which scales the image's latents."""

    family = "instruct_pix2pix_xl"
    claims = StableDiffusionXL.claims._replace(
        pipelines=("StableDiffusionXLInstructPix2PixPipeline",), beside=(1, 0)
    )
    processes = (DiscreteDiffusion,)
