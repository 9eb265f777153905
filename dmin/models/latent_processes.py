"""Latent diffusions by their process: denoising in discrete steps, or a flow."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dmin.diffusion.processes import DiscreteDiffusion, RectifiedFlow
from dmin.models.latent import LatentDiffusion
from dmin.models.schedulers import discrete_diffusion
from dmin.runtime.errors import DminError


class LatentDenoiser(LatentDiffusion):
    """A latent diffusion in discrete timesteps that predicts ε, v or x0.

    Args:
        pipeline: of diffusers, with all its components.
        snr_gamma: weighs losses by min-SNR with this γ (Hang et al. 2023), if the model was trained
            so; None for equal weights.
        settings: of :class:`LatentDiffusion`.
    """

    process: DiscreteDiffusion

    def __init__(self, pipeline: Any, *, snr_gamma: float | None = None, **settings: Any) -> None:
        super().__init__(
            pipeline, discrete_diffusion(pipeline.scheduler.config, snr_gamma), **settings
        )


class LearnedVariance(LatentDenoiser):
    """A denoiser that predicts the variance of its steps as well (Nichol & Dhariwal 2021).

    Args:
        pipeline: of diffusers, with all its components.
        variance_loss: add the variational bound that trained the variance, as in the published
            training code; off, the loss is that of the mean alone, as in most fine-tuning.
        settings: of :class:`LatentDenoiser`.
    """

    def __init__(self, pipeline: Any, *, variance_loss: bool = False, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        channels = self.network.config["in_channels"]
        if variance_loss and self.network.out_channels != 2 * channels:
            raise DminError(
                f"model.variance_loss=true, but this {type(self.network).__name__} predicts no "
                f"variance ({self.network.out_channels} channels out for {channels} in). Set it to "
                f"false."
            )
        self.variance_loss = variance_loss

    def describe(self) -> dict[str, Any]:
        """Return what defines latents, condition and loss."""
        return {**super().describe(), **({"variance_loss": True} if self.variance_loss else {})}

    def _bound(
        self, x0: Tensor, noised: Tensor, t: Tensor, mean: Tensor, variance: Tensor
    ) -> Tensor | None:
        if not self.variance_loss:
            return None
        return self.process.variance_bound(x0, noised, t, mean, variance)


class LatentFlow(LatentDiffusion):
    """A rectified flow in latents that predicts the velocity ε − x0.

    Args:
        pipeline: of diffusers, with all its components.
        shift: of the ladder towards noise; None for the scheduler's. It moves the timesteps that
            schedules choose from, not the loss at a timestep.
        settings: of :class:`LatentDiffusion`.
    """

    process: RectifiedFlow

    def __init__(self, pipeline: Any, *, shift: float | None = None, **settings: Any) -> None:
        super().__init__(pipeline, RectifiedFlow(pipeline.scheduler.config, shift), **settings)
