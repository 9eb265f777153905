"""Inpainting: networks that take a mask and the latents of the masked image."""

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from dmin.models.families.flux import Flux
from dmin.models.families.image_conditions import Inpainting
from dmin.models.families.stable_diffusion import StableDiffusion
from dmin.models.families.stable_diffusion_xl import StableDiffusionXL


class StableDiffusionInpaint(StableDiffusion, Inpainting):
    """Stable Diffusion 1.x and 2 for inpainting (Rombach et al. 2022), with nine channels."""

    family = "stable_diffusion_inpaint"
    claims = StableDiffusion.claims._replace(
        pipelines=("StableDiffusionInpaintPipeline",), beside=(1, 1)
    )


class StableDiffusionXLInpaint(StableDiffusionXL, Inpainting):
    """Stable Diffusion XL for inpainting, with nine channels."""

    family = "stable_diffusion_xl_inpaint"
    claims = StableDiffusionXL.claims._replace(
        pipelines=("StableDiffusionXLInpaintPipeline",), beside=(1, 1)
    )


class FluxFill(Flux, Inpainting):
    """FLUX.1 Fill (Black Forest Labs 2024): the mask's pixels are channels of each latent pixel."""

    family = "flux_fill"
    claims = Flux.claims._replace(pipelines=("FluxFillPipeline",), beside=(1, 64))
    own_guidance = 30.0

    def _mask_of(self, mask: Tensor, latents: Tensor) -> Tensor:
        return pixel_unshuffle(mask, self.vae_factor)

    def _ordered(self, mask: Tensor, latents: Tensor) -> Tensor:
        return torch.cat([latents, mask], 1)
