"""Networks with additional input channels for a drawing or a depth map."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import interpolate

from dmin.models.families.flux import Flux
from dmin.models.families.image_conditions import ImageConditioned
from dmin.models.families.stable_diffusion import StableDiffusion
from dmin.runtime.errors import DminError


class FluxControl(Flux, ImageConditioned):
    """FLUX.1 Canny and Depth, and similar fine-tuned models, with the latents of a drawing."""

    family = "flux_control"
    claims = Flux.claims._replace(pipelines=("FluxControlPipeline",), beside=(1, 0))
    own_guidance = 30.0

    def _beside(self, batch: Mapping[str, Any]) -> Tensor:
        return self._encoded_image(self._condition_image(batch), self.latents)

    def _call(self, images: Mapping[str, Any]) -> dict[str, Any]:
        return {"control_image": 2 * images["condition_image"] - 1}  # tensors are not rescaled


class StableDiffusionDepth(StableDiffusion, ImageConditioned):
    """Stable Diffusion 2 depth: a depth map of each image, scaled linearly to [−1, 1].

    The depth estimator is not loaded, since the maps are data.
    """

    family = "stable_diffusion_depth"
    claims = StableDiffusion.claims._replace(
        pipelines=("StableDiffusionDepth2ImgPipeline",), beside=(0, 1)
    )
    components: ClassVar[dict[str, Any]] = {"depth_estimator": None, "feature_extractor": None}

    def _beside(self, batch: Mapping[str, Any]) -> Tensor:
        depth = self._grey(batch)
        places = [side // self.vae_factor for side in depth.shape[-2:]]
        depth = interpolate(depth, size=places, mode="bicubic", align_corners=False)
        low, high = depth.amin((1, 2, 3), True), depth.amax((1, 2, 3), True)
        if (high == low).any():
            raise DminError(f"the depth map of {batch['id'][0]!r}, or of its batch, is constant.")
        return 2 * (depth - low) / (high - low) - 1

    def _call(self, images: Mapping[str, Any]) -> dict[str, Any]:
        depth = images["condition_image"][:, 0]
        return {"image": images["image"], "depth_map": depth, "strength": 1.0}
