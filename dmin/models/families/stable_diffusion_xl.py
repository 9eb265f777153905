"""Stable Diffusion XL: a larger UNet, also conditioned on image sizes."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmin.diffusion.process import Process
from dmin.diffusion.processes import EDM, DiscreteDiffusion, RectifiedFlow
from dmin.models.base import Condition
from dmin.models.conditioning import SizeConditioning
from dmin.models.relatives import UNET, Claims, variants
from dmin.runtime.errors import DminError


class StableDiffusionXL(SizeConditioning):
    """Stable Diffusion XL (Podell et al. 2023); predicts ε or v.

    Its descendants with Karras' preconditioning (Playground 2.5, CosXL) or trained as a flow are
    taken as such.
    """

    family = "stable_diffusion_xl"
    claims: ClassVar[Claims] = Claims(
        UNET,
        variants("StableDiffusionXL"),
        takes={"addition_embed_type": ("text_time",)},
        keys=("conditioner.embedders.1.",),
    )
    processes: ClassVar[tuple[type[Process], ...]] = (DiscreteDiffusion, EDM, RectifiedFlow)
    network_name: ClassVar[str] = "unet"
    components: ClassVar[dict[str, Any]] = {"add_watermarker": False}
    encoded = ("encoder_hidden_states", None, "text_embeds")

    def __init__(self, pipeline: Any, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        config = self.network.config
        told = (
            6 * (config.addition_time_embed_dim or 0)
            + pipeline.text_encoder_2.config.projection_dim
        )
        if config.projection_class_embeddings_input_dim not in (None, told):
            raise DminError(
                f"model.path: this network takes {config.projection_class_embeddings_input_dim} "
                f"additional numbers, while six sizes and the pooled text are {told}; the "
                f"refiner, for example, takes an aesthetic score. Give the base model's "
                f"checkpoint."
            )

    def _no_prompt(self) -> Condition:
        nothing = super()._no_prompt()
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return nothing
        return {name: torch.zeros_like(value) for name, value in nothing.items()}

    def _sizes(self, batch: Mapping[str, Any]) -> Condition:
        rows = [[*m.original, *m.crop, *m.target] for m in self._micro_conditioning(batch)]
        return {"time_ids": batch["image"].new_tensor(rows)}

    def _told(self, noised: Tensor, condition: Condition) -> dict[str, Any]:
        added = {k: condition[k] for k in ("text_embeds", "time_ids")}
        text = condition["encoder_hidden_states"]
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}
