"""PixArt-α: a small text-to-image transformer on latents."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from dmin.models.base import Condition
from dmin.models.conditioning import LongCaptioned
from dmin.models.latent import LearnedVariance
from dmin.models.relatives import Claims


class PixArt(LongCaptioned, LearnedVariance):
    """PixArt-α (Chen et al. 2023) and PixArt-Σ (Chen et al. 2024); predicts ε.

    Captions are not changed: the pipeline's ``clean_caption`` is off.
    """

    family = "pixart"
    claims: ClassVar[Claims] = Claims(
        "PixArtTransformer2DModel", ("PixArtAlphaPipeline",), ("PixArtSigmaPipeline",)
    )
    own_length: int = 120
    encoded = ("encoder_hidden_states", "encoder_attention_mask")
    sampled_with: ClassVar[dict[str, Any]] = {
        "clean_caption": False,
        "use_resolution_binning": False,
    }

    def __init__(self, pipeline: Any, **settings: Any) -> None:
        if type(pipeline).__name__ == "PixArtSigmaPipeline":
            self.own_length = 300  # as in its training and its pipeline's call
        super().__init__(pipeline, **settings)

    def _sizes(self, batch: Mapping[str, Any]) -> Condition:
        if not self.network.use_additional_conditions:
            return {}
        image = batch["image"]
        height, width = image.shape[-2:]  # the 1024-pixel model is conditioned on size and shape
        rows = {"resolution": [height, width], "aspect_ratio": [height / width]}
        return {k: image.new_tensor(row).repeat(len(image), 1) for k, row in rows.items()}

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        sizes = ("resolution", "aspect_ratio")
        text = {k: v for k, v in condition.items() if k not in sizes}
        return {**text, "added_cond_kwargs": {k: condition.get(k) for k in sizes}}
