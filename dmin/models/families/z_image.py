"""Z-Image: a transformer on lists of images and captions, each of its own length."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from dmin.models.base import Condition
from dmin.models.families.flow import PaddedCaptioned
from dmin.models.relatives import Claims, variants


class ZImage(PaddedCaptioned):
    """Z-Image (Alibaba 2025); for the distilled Turbo the loss is that of fine-tuning it.

    The pipeline's guidance is ``c + s (c − ∅)``, so its scale s is ``query_guidance`` − 1.
    """

    family = "z_image"
    claims: ClassVar[Claims] = Claims(
        "ZImageTransformer2DModel",
        variants("ZImage")[:2],
        keys=("layers.0.adaLN_modulation.0.", "cap_embedder.0.", "x_pad_token"),
        gives=("x", "t", "cap_feats"),
    )
    shifted = True
    time_name, time_unit, sign = "t", "signal", -1
    encoded = ("cap_feats", "mask")

    @property
    def patch(self) -> int:
        """Latent pixels in each direction that form one token."""
        return int(self.network.config.all_patch_size[0])

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        pairs = zip(condition["cap_feats"], condition["mask"], strict=True)
        return {"cap_feats": [caption[mask] for caption, mask in pairs]}

    def _tokens(self, latents: Tensor) -> list[Tensor]:
        return list(latents.unsqueeze(2))

    def _latents(self, tokens: Any, shape: Any) -> Tensor:
        return torch.stack(list(tokens)).squeeze(2) if isinstance(tokens, list | tuple) else tokens
