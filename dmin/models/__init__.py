"""Diffusion models as dmin sees them, one file a family.

The families import diffusers, which is slow: each is imported when its name is first used.
"""

from importlib import import_module
from typing import Any

from dmin.models.base import READOUTS, Condition, DiffusionModel, Prediction
from dmin.models.logging_filters import leave_out_remarks

leave_out_remarks()

_FAMILIES = {
    "DDPM": "families.ddpm",
    "DiT": "families.dit",
    "Flux": "families.flux",
    "HunyuanDiT": "families.hunyuan_dit",
    "MLP": "toy.mlp",
    "PixArt": "families.pixart",
    "Sana": "families.sana",
    "StableDiffusion": "families.stable_diffusion",
    "StableDiffusion3": "families.stable_diffusion_3",
    "StableDiffusionXL": "families.stable_diffusion_xl",
    "auto": "recognition",
}

__all__ = ["READOUTS", "Condition", "DiffusionModel", "Prediction"]


def __getattr__(name: str) -> Any:
    if name not in _FAMILIES:
        raise AttributeError(f"module 'dmin.models' has no attribute {name!r}")
    return getattr(import_module(f"dmin.models.{_FAMILIES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_FAMILIES])
