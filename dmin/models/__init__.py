"""Diffusion models, one file for each family.

The families import diffusers, which is slow: each is imported when its name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmin.models.base import READOUTS, Condition, DiffusionModel, Prediction
from dmin.models.logging_filters import filter_logging

if TYPE_CHECKING:  # for type checkers, the names below
    from dmin.models.families.chroma import Chroma as Chroma
    from dmin.models.families.control import (
        FluxControl as FluxControl,
        StableDiffusionDepth as StableDiffusionDepth,
    )
    from dmin.models.families.ddpm import DDPM as DDPM
    from dmin.models.families.dit import DiT as DiT
    from dmin.models.families.flux import Flux as Flux
    from dmin.models.families.flux_2 import Flux2 as Flux2
    from dmin.models.families.flux_kontext import FluxKontext as FluxKontext
    from dmin.models.families.hunyuan_dit import HunyuanDiT as HunyuanDiT
    from dmin.models.families.inpainting import (
        FluxFill as FluxFill,
        StableDiffusionInpaint as StableDiffusionInpaint,
        StableDiffusionXLInpaint as StableDiffusionXLInpaint,
    )
    from dmin.models.families.instruct_pix2pix import (
        InstructPix2Pix as InstructPix2Pix,
        InstructPix2PixXL as InstructPix2PixXL,
    )
    from dmin.models.families.lumina_2 import Lumina2 as Lumina2
    from dmin.models.families.pixart import PixArt as PixArt
    from dmin.models.families.qwen_image import (
        QwenImage as QwenImage,
        QwenImageEdit as QwenImageEdit,
    )
    from dmin.models.families.sana import Sana as Sana
    from dmin.models.families.stable_diffusion import StableDiffusion as StableDiffusion
    from dmin.models.families.stable_diffusion_3 import StableDiffusion3 as StableDiffusion3
    from dmin.models.families.stable_diffusion_xl import (
        StableDiffusionXL as StableDiffusionXL,
        StableDiffusionXLRefiner as StableDiffusionXLRefiner,
    )
    from dmin.models.families.wan import Wan as Wan
    from dmin.models.families.z_image import ZImage as ZImage
    from dmin.models.in_hand import from_pipeline as from_pipeline
    from dmin.models.recognition import auto as auto
    from dmin.models.toy.mlp import MLP as MLP

filter_logging()

_FAMILIES = {
    "Chroma": "families.chroma",
    "DDPM": "families.ddpm",
    "DiT": "families.dit",
    "Flux": "families.flux",
    "Flux2": "families.flux_2",
    "FluxControl": "families.control",
    "FluxFill": "families.inpainting",
    "FluxKontext": "families.flux_kontext",
    "HunyuanDiT": "families.hunyuan_dit",
    "InstructPix2Pix": "families.instruct_pix2pix",
    "InstructPix2PixXL": "families.instruct_pix2pix",
    "Lumina2": "families.lumina_2",
    "MLP": "toy.mlp",
    "PixArt": "families.pixart",
    "QwenImage": "families.qwen_image",
    "QwenImageEdit": "families.qwen_image",
    "Sana": "families.sana",
    "StableDiffusion": "families.stable_diffusion",
    "StableDiffusion3": "families.stable_diffusion_3",
    "StableDiffusionDepth": "families.control",
    "StableDiffusionInpaint": "families.inpainting",
    "StableDiffusionXL": "families.stable_diffusion_xl",
    "StableDiffusionXLInpaint": "families.inpainting",
    "StableDiffusionXLRefiner": "families.stable_diffusion_xl",
    "Wan": "families.wan",
    "ZImage": "families.z_image",
    "auto": "recognition",
    "from_pipeline": "in_hand",
}

__all__ = ["READOUTS", "Condition", "DiffusionModel", "Prediction"]


if not TYPE_CHECKING:  # otherwise checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _FAMILIES:
            raise AttributeError(f"module 'dmin.models' has no attribute {name!r}")
        return getattr(import_module(f"dmin.models.{_FAMILIES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_FAMILIES])
