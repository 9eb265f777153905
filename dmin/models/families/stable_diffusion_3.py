"""Stable Diffusion 3 and 3.5: a transformer on text and latents, trained as a rectified flow."""

from typing import Any, ClassVar, Literal

from dmin.models.families.flow import Flow
from dmin.models.relatives import Claims, variants
from dmin.runtime.errors import DminError


class StableDiffusion3(Flow):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024).

    Args:
        pipeline: a diffusers pipeline with all its components.
        target: target of the output: ``model`` for the velocity ε − x0 that it was trained to
            predict; ``noise`` for ε, which DMin's published code uses by mistake, to reproduce
            its results.
        settings: settings of the base classes.
    """

    family = "stable_diffusion_3"
    claims: ClassVar[Claims] = Claims(
        "SD3Transformer2DModel",
        variants("StableDiffusion3"),
        keys=("joint_blocks.0.",),
        without=("text_encoder_3", "tokenizer_3"),
    )
    shifted = True
    own_length: int = 256
    encoding: ClassVar[dict[str, Any]] = {
        "prompt_2": None,
        "prompt_3": None,
        "do_classifier_free_guidance": False,
    }
    encoded = ("encoder_hidden_states", None, "pooled_projections")

    def __init__(
        self,
        pipeline: Any,
        *,
        target: Literal["model", "noise"] = "model",
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, **settings)
        if target not in ("model", "noise"):
            raise DminError(f"model.target={target!r}: allowed are model and noise.")
        self.process.target = "velocity" if target == "model" else "noise"
