"""Qwen-Image: a transformer on packed latents of a video autoencoder, told by a language model."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from dmin.models.base import Condition
from dmin.models.families.flow import PaddedCaptioned
from dmin.models.relatives import Claims, variants


class QwenImage(PaddedCaptioned):
    """Qwen-Image (Wu et al. 2025); ``guidance_scale`` is its pipeline's ``true_cfg_scale``."""

    family = "qwen_image"
    claims: ClassVar[Claims] = Claims(
        "QwenImageTransformer2DModel",
        variants("QwenImage")[:2],
        packing=4,
        keys=("transformer_blocks.0.img_mlp.", "txt_norm."),
        vae=("AutoencoderKLQwenImage",),
    )
    time_unit = "sigma"
    encoding: ClassVar[dict[str, Any]] = {}
    encoded = ("encoder_hidden_states", "encoder_hidden_states_mask")

    def _no_prompt(self) -> Condition:
        return self._embed([" "])

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        batch, _, height, width = noised.shape
        return {"img_shapes": [[(1, height // 2, width // 2)]] * batch, **condition}

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        asked = super()._sampling(prompts)
        scale = asked.pop("guidance_scale", None)
        guided = {} if scale is None else {"true_cfg_scale": scale}
        return {**asked, **guided, "negative_prompt": [" "] * len(prompts)}
