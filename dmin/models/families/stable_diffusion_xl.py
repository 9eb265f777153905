"""Stable Diffusion XL: a larger UNet that is told the sizes of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from dmin.diffusion.processes import EDM, DiscreteDiffusion, RectifiedFlow
from dmin.models.base import Condition
from dmin.models.conditioning import SizeConditioning


class StableDiffusionXL(SizeConditioning):
    """Stable Diffusion XL (Podell et al. 2023); predicts ε or v.

    Its descendants with Karras' preconditioning (Playground 2.5, CosXL) or trained as a flow are
    taken as such.
    """

    pipeline_class = StableDiffusionXLPipeline
    processes = (DiscreteDiffusion, EDM, RectifiedFlow)
    network_name: ClassVar[str] = "unet"
    components: ClassVar[dict[str, Any]] = {"add_watermarker": False}
    encoded = ("encoder_hidden_states", None, "text_embeds")

    def _no_prompt(self) -> Condition:
        nothing = super()._no_prompt()
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return nothing
        return {name: torch.zeros_like(value) for name, value in nothing.items()}

    def _sizes(self, batch: Mapping[str, Any]) -> Condition:
        rows = [[*m.original, *m.crop, *m.target] for m in self._micro_conditioning(batch)]
        return {"time_ids": batch["image"].new_tensor(rows)}

    def _predict(self, noised: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network(
            noised,
            t,
            encoder_hidden_states=condition["encoder_hidden_states"],
            added_cond_kwargs={k: condition[k] for k in ("text_embeds", "time_ids")},
        ).sample
