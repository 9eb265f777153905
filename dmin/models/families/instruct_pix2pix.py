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
    """Given the latents of an image to change, as the autoencoder has them: not scaled."""

    def _beside(self, batch: Mapping[str, Any]) -> Tensor:
        return vae.unscale(super()._beside(batch), self.pipeline.vae.config, self.shifted)


class InstructPix2Pix(StableDiffusion, Edited):
    """InstructPix2Pix (Brooks et al. 2023): an image to change, and an instruction as caption."""

    family = "instruct_pix2pix"
    claims = StableDiffusion.claims._replace(
        pipelines=("StableDiffusionInstructPix2PixPipeline",), beside=(1, 0)
    )

    def _encode(self, prompts: Sequence[Any], **told: Any) -> Condition:
        texts, device = self._texts(prompts), self._text_device
        return {"encoder_hidden_states": self.pipeline._encode_prompt(texts, device, 1, False)}

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        asked = super()._sampling(prompts)  # the size is that of the image
        return {name: asked[name] for name in asked if name not in ("height", "width")}


class InstructPix2PixXL(StableDiffusionXL, Edited):
    """The same of Stable Diffusion XL; CosXL-Edit, which scales the image's latents, is EDM."""

    family = "instruct_pix2pix_xl"
    claims = StableDiffusionXL.claims._replace(
        pipelines=("StableDiffusionXLInstructPix2PixPipeline",), beside=(1, 0)
    )
    processes = (DiscreteDiffusion,)
