"""Lumina Image 2: one transformer over caption and image, with Gemma 2 as the text encoder."""

from typing import Any, ClassVar

from dmin.models.base import Condition
from dmin.models.families.flow import Flow
from dmin.models.relatives import Claims


class Lumina2(Flow):
    """Lumina Image 2.0 (Qin et al. 2025); the system prompt precedes every caption."""

    family = "lumina_2"
    claims: ClassVar[Claims] = Claims(
        "Lumina2Transformer2DModel",
        ("Lumina2Pipeline",),
        keys=("cap_embedder.0.", "noise_refiner.0."),
        gives=("encoder_attention_mask",),
    )
    shifted = True
    time_unit, sign = "signal", -1
    own_length: int = 256
    encoded = ("encoder_hidden_states", "encoder_attention_mask")

    def _no_prompt(self) -> Condition:
        found: Any = self.pipeline._get_gemma_prompt_embeds(
            [""], self._text_device, self.max_sequence_length
        )
        return dict(zip(self.encoded, found, strict=True))
