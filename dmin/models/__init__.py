"""Diffusion models as dmin sees them, one file a family.

The families import diffusers, which is slow: each is imported when its name is first used.
"""

from importlib import import_module
from typing import Any

from dmin.models.base import READOUTS, Condition, DiffusionModel, Prediction
from dmin.models.logging_filters import leave_out_remarks

leave_out_remarks()

_FAMILIES = {
    "Chroma": "families.chroma",
    "DDPM": "families.ddpm",
    "DiT": "families.dit",
    "Flux": "families.flux",
    "Flux2": "families.flux_2",
    "HunyuanDiT": "families.hunyuan_dit",
    "Lumina2": "families.lumina_2",
    "MLP": "toy.mlp",
    "PixArt": "families.pixart",
    "QwenImage": "families.qwen_image",
    "Sana": "families.sana",
    "StableDiffusion": "families.stable_diffusion",
    "StableDiffusion3": "families.stable_diffusion_3",
    "StableDiffusionXL": "families.stable_diffusion_xl",
    "Wan": "families.wan",
    "ZImage": "families.z_image",
    "auto": "recognition",
    "from_pipeline": "in_hand",
}

__all__ = ["READOUTS", "Condition", "DiffusionModel", "Prediction"]


def __getattr__(name: str) -> Any:
    if name not in _FAMILIES:
        raise AttributeError(f"module 'dmin.models' has no attribute {name!r}")
    return getattr(import_module(f"dmin.models.{_FAMILIES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_FAMILIES])
