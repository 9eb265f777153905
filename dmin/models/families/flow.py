"""Base classes of rectified-flow families: defaults, guidance as an input, padded captions."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from dmin.diffusion.process import Process
from dmin.diffusion.processes import RectifiedFlow
from dmin.models.base import Condition
from dmin.models.conditioning import LongCaptioned


class Flow(LongCaptioned):
    """A rectified flow with captions of a chosen length, for 1024 pixels by default."""

    processes: ClassVar[tuple[type[Process], ...]] = (RectifiedFlow,)
    own_length: int = 512
    own_size: ClassVar[int] = 128


class GuidanceEmbedded(Flow):
    """A distilled model with guidance as an input of the network.

    Args:
        pipeline: a diffusers pipeline with all its components.
        embedded_guidance: value of this input in attribution, which should be that of fine-tuning;
            None for the default of diffusers' training scripts, 3.5, or 30 for Fill and Control.
            Ignored by models without the input (schnell, klein). ``guidance_scale`` is its value
            in sampling.
        settings: settings of the base classes.
    """

    own_guidance: ClassVar[float] = 3.5

    def __init__(
        self, pipeline: Any, *, embedded_guidance: float | None = None, **settings: Any
    ) -> None:
        super().__init__(pipeline, **settings)
        own = self.own_guidance if embedded_guidance is None else embedded_guidance
        self.embedded_guidance: float = own

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss."""
        told = self.embedded_guidance if self.network.config.guidance_embeds else None
        return {**super().describe(), "embedded_guidance": told}

    def _guidance(self, noised: torch.Tensor) -> torch.Tensor | None:
        if not self.network.config.guidance_embeds:
            return None
        return noised.new_full((len(noised),), self.embedded_guidance)


class PaddedCaptioned(Flow):
    """Conditioned on captions of variable length, each encoded alone, independent of the others.

    They are padded with zeros to the chosen length and kept with a mask.
    """

    def _encode(self, prompts: Sequence[Any], **told: Any) -> Condition:
        embedding, mask = self.encoded
        rows = [self._alone(text, **told)[: self.max_sequence_length] for text in prompts]
        shape = (len(rows), int(self.max_sequence_length or 0))
        found = {
            str(embedding): rows[0].new_zeros(*shape, rows[0].shape[1]),
            str(mask): torch.zeros(shape, dtype=torch.bool, device=rows[0].device),
        }
        for number, row in enumerate(rows):
            for name, value in ((str(embedding), row), (str(mask), True)):
                found[name][number, : len(row)] = value
        return found

    def _alone(self, prompt: Any, **told: Any) -> torch.Tensor:
        """Return the embedding of one caption, ``[tokens, width]``."""
        device, length = self._text_device, self.max_sequence_length
        asked = {"device": device, "max_sequence_length": length, **told}
        # A new list, because some pipelines write the chat template into it.
        found: torch.Tensor = self.pipeline.encode_prompt(self._texts([prompt]), **asked)[0][0]
        return found
