"""What latent diffusion models that are conditioned on captions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from dmin.errors import DminError
from dmin.models.latent import LatentDiffusion


class Captioned(LatentDiffusion):
    """Conditioned on captions: to be named before :class:`LatentDenoiser` or :class:`LatentFlow`.

    Args:
        pipeline: of diffusers, with all its components.
        empty_captions: ``raise`` an error at a caption of no words, or ``keep`` it: what the model
            knows as the unconditional case.
        settings: of the next class.
    """

    def __init__(
        self,
        pipeline: Any,
        *args: Any,
        empty_captions: Literal["raise", "keep"] = "raise",
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, *args, **settings)
        if empty_captions not in ("raise", "keep"):
            raise DminError(f"model.empty_captions={empty_captions!r}: allowed are raise and keep.")
        self.empty_captions = empty_captions

    def _prompts(self, batch: Mapping[str, Any]) -> list[str]:
        for name, caption in zip(batch["id"], batch["caption"], strict=True):
            if caption is None:
                raise DminError(
                    f"example {name!r} has no caption, and {type(self).__name__} is conditioned on "
                    f"captions. Add it to the data (column text of metadata.jsonl)."
                )
            if not caption.strip() and self.empty_captions == "raise":
                raise DminError(
                    f"example {name!r} has an empty caption. Add one, or set "
                    f"model.empty_captions=keep if the model was trained without captions too."
                )
        return list(batch["caption"])

    def _sampling(self, prompts: Sequence[Any]) -> dict[str, Any]:
        height, width = self.sample_size or (None, None)
        asked = {"prompt": self._texts(prompts), "height": height, "width": width}
        return {**super()._sampling(prompts), **asked}

    @staticmethod
    def _texts(prompts: Sequence[Any]) -> list[str]:
        wrong = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if wrong:
            raise DminError(f"prompt {wrong[0]!r} is not a text. Give captions in quotes.")
        return list(prompts)

    @property
    def _text_device(self) -> torch.device:
        """Where the text encoders are."""
        encoders = (e for name, e in self.encoders.items() if name.startswith("text_encoder"))
        return next(next(encoder.parameters()).device for encoder in encoders)
