"""Sana: a transformer with linear attention on latents of a deep autoencoder."""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from dmin.models.base import Condition
from dmin.models.families.flow import Flow
from dmin.models.relatives import Claims
from dmin.runtime.errors import DminError


class Sana(Flow):
    """Sana (Xie et al. 2024).

    Args:
        pipeline: a diffusers pipeline with all its components.
        instruction: text before every caption for the language model that encodes it: ``pipeline``
            for that of diffusers' sampler, or ``none``. It should be the same as in training.
        settings: settings of the base classes.
    """

    family = "sana"
    claims: ClassVar[Claims] = Claims("SanaTransformer2DModel", ("SanaPipeline", "SanaPAGPipeline"))
    own_length: int = 300
    encoded = ("encoder_hidden_states", "encoder_attention_mask")
    sampled_with: ClassVar[dict[str, Any]] = {"use_resolution_binning": False}

    def __init__(
        self,
        pipeline: Any,
        *,
        instruction: Literal["pipeline", "none"] = "pipeline",
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, **settings)
        if instruction not in ("pipeline", "none"):
            raise DminError(f"model.instruction={instruction!r}: allowed are pipeline and none.")
        self.instruction = instruction

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss."""
        return {**super().describe(), "instruction": self._instruction()}

    def _instruction(self) -> list[str] | None:
        if self.instruction == "none":
            return None
        call = inspect.signature(type(self.pipeline).__call__)
        return list(call.parameters["complex_human_instruction"].default)

    def _encode(self, prompts: Sequence[Any], **told: Any) -> Condition:
        instruction = {"complex_human_instruction": self._instruction(), **told}
        return super()._encode(prompts, **instruction)

    def _no_prompt(self) -> Condition:
        return self._encode([""], **self.encoding, complex_human_instruction=None)

    def _time(self, t: Tensor) -> Tensor:
        scaled: Tensor = t * self.network.config.timestep_scale
        return scaled

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        instruction = {"complex_human_instruction": self._instruction()}
        return {**super()._sampling(prompts), **instruction}
