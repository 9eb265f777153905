"""FLUX.1 Kontext: Flux with the tokens of an image to edit after those of the noised image."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmin.models.base import Condition
from dmin.models.families.flux import Flux
from dmin.models.families.image_conditions import ImageTokens


class FluxKontext(Flux, ImageTokens):
    """FLUX.1 Kontext (Black Forest Labs 2025); the image to edit has the size of the result."""

    family = "flux_kontext"
    claims = Flux.claims._replace(pipelines=("FluxKontextPipeline",))

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        told = super()._told(noised, condition)
        other = told["img_ids"].clone()
        other[:, 0] = 1  # the first column numbers images
        return {**told, "img_ids": torch.cat([told["img_ids"], other])}

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        height, width = self._generated_size()
        return {**super()._sampling(prompts), "max_area": height * width, "_auto_resize": False}
