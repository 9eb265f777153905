"""HunyuanDiT: a transformer on latents, with two text encoders, conditioned on image sizes."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor

from dmin.models.base import Condition
from dmin.models.conditioning import SizeConditioning
from dmin.models.latent import LearnedVariance
from dmin.models.relatives import Claims


class HunyuanDiT(SizeConditioning, LearnedVariance):
    """HunyuanDiT 1.0 to 1.2 (Li et al. 2024); predicts v.

    The safety checker is not loaded, since it could make queries black.
    """

    family = "hunyuan_dit"
    claims: ClassVar[Claims] = Claims(
        "HunyuanDiT2DModel", ("HunyuanDiTPipeline", "HunyuanDiTPAGPipeline")
    )
    components: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
    }
    encoded = ("encoder_hidden_states", None, "text_embedding_mask")
    sampled_with: ClassVar[dict[str, Any]] = {"use_resolution_binning": False}

    def _embed(self, prompts: Sequence[Any]) -> Condition:
        named: dict[str, Tensor] = {}
        # The lengths in the pipeline's call.
        for index, (suffix, length) in enumerate({"": 77, "_t5": 256}.items()):
            told = {"max_sequence_length": length, "text_encoder_index": index}
            found = self._encode(prompts, **self.encoding, **told)
            named |= {f"{name}{suffix}": x for name, x in found.items()}
        return named

    def _sizes(self, batch: Mapping[str, Any]) -> Condition:
        image = batch["image"]
        rows = [[*m.original, *m.target, *m.crop] for m in self._micro_conditioning(batch)]
        style = torch.zeros(len(image), dtype=torch.long, device=image.device)
        return {"image_meta_size": image.new_tensor(rows), "style": style}

    def _time(self, t: Tensor) -> Tensor:
        return t.to(self.network.dtype)  # the network computes in the dtype of t

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        return {"image_rotary_emb": self._positions(noised), **condition}

    def _positions(self, noised: Tensor) -> Any:
        """Return the rotary embedding of the pipeline's call, on a grid cropped for 512 pixels."""
        grid = noised.shape[-2] // self.patch, noised.shape[-1] // self.patch
        region = get_resize_crop_region_for_grid(grid, 512 // 8 // self.patch)
        width = self.network.inner_dim // self.network.num_heads
        return get_2d_rotary_pos_embed(width, region, grid, device=noised.device, output_type="pt")
