"""The noise schedule that a model was trained with, read from the config of any scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DDPMScheduler

from dmin.diffusion.processes import DiscreteDiffusion


def discrete_diffusion(
    config: Mapping[str, Any], snr_gamma: float | None = None
) -> DiscreteDiffusion:
    """Return the training process of a model.

    Args:
        config: of any diffusers scheduler; its noise schedule and prediction type are read.
        snr_gamma: as for :class:`DiscreteDiffusion`.

    Raises:
        DminError: as for :class:`DiscreteDiffusion`.
    """
    known = inspect.signature(DDPMScheduler).parameters
    scheduler = DDPMScheduler(**{k: v for k, v in config.items() if k in known})
    return DiscreteDiffusion(scheduler, snr_gamma)
