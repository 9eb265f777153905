"""Stable Diffusion 1.x and 2.x: ``UNet2DConditionModel`` in the latents of a VAE."""

from typing import Any, ClassVar

from dmin.diffusion.processes import EDM, DiscreteDiffusion, RectifiedFlow
from dmin.models.conditioning import Captioned
from dmin.models.relatives import UNET, Claims, variants


class StableDiffusion(Captioned):
    """Stable Diffusion 1.x (predicts ε) and 2.x (ε or v) (Rombach et al. 2022).

    Networks fine-tuned as a flow or with Karras' preconditioning are recognised by the scheduler.

    The safety checker is not loaded, since it could make queries black.
    """

    family = "stable_diffusion"
    claims: ClassVar[Claims] = Claims(
        UNET,
        variants("StableDiffusion"),
        takes={"encoder_hid_dim_type": ("text_proj",)},
        keys=("cond_stage_model.",),
    )
    processes = (DiscreteDiffusion, EDM, RectifiedFlow)
    network_name: ClassVar[str] = "unet"
    components: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
    }
    encoding: ClassVar[dict[str, Any]] = {
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    encoded = ("encoder_hidden_states",)
