"""Adapters (LoRA and others): read, applied with the file's own factors as parameters, saved."""

from dmin.models.adapters.loaded import (
    describe_adapters,
    is_adapted,
    save_adapters,
    without_adapters,
)
from dmin.models.adapters.loading import load_adapters
from dmin.models.adapters.words import words_of

__all__ = [
    "describe_adapters",
    "is_adapted",
    "load_adapters",
    "save_adapters",
    "without_adapters",
    "words_of",
]
