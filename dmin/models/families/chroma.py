"""Chroma: Flux without guidance, whose network sees a mask of the caption."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dmin.models.base import Condition
from dmin.models.families.flow import Flow
from dmin.models.relatives import Claims, variants


class Chroma(Flow):
    """Chroma (Lodestone Rock 2025): attention uses the caption's tokens and one padding token."""

    family = "chroma"
    claims: ClassVar[Claims] = Claims(
        "ChromaTransformer2DModel",
        variants("Chroma")[:2],
        packing=4,
        keys=("double_blocks.0.", "distilled_guidance_layer."),
    )
    shifted = True
    time_unit = "sigma"
    encoded = ("encoder_hidden_states", None, "attention_mask")

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        batch, _, height, width = noised.shape
        text, mask = condition["encoder_hidden_states"], condition["attention_mask"]
        ids = self.pipeline._prepare_latent_image_ids(
            batch, height // 2, width // 2, noised.device, noised.dtype
        )
        return {
            "encoder_hidden_states": text,
            "attention_mask": torch.cat([mask, mask.new_ones(batch, len(ids))], 1),
            "txt_ids": text.new_zeros(text.shape[1], 3),
            "img_ids": ids,
        }
