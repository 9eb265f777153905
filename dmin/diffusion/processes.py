"""How an image becomes noise, and what the model is trained to predict of it on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dmin.runtime.errors import DminError
from dmin.runtime.transfer import to_device


class Noised(NamedTuple):
    """Noised examples, what a model should say of them, and how much that counts."""

    sample: Tensor  # x_t, as x0
    target: Tensor  # as x0
    weight: Tensor  # [batch], of the example's loss


class DiscreteDiffusion:
    """A variance-preserving diffusion in discrete timesteps (Ho et al. 2020).

    ``x_t = √ᾱ_t x0 + √(1−ᾱ_t) ε``. The target is ε, v = √ᾱ_t ε − √(1−ᾱ_t) x0 (Salimans & Ho 2022)
    or x0, as the scheduler's ``prediction_type`` says. With γ, losses are weighted by min-SNR (Hang
    et al. 2023), ``min(SNR, γ)`` in units of x0: divided by SNR for ε, by SNR + 1 for v.

    Args:
        scheduler: diffusers' ``DDPMScheduler``, of which ``alphas_cumprod``, ``betas`` (both
            ``[timesteps]``), ``add_noise``, ``get_velocity`` and ``config`` are used.
        snr_gamma: γ, usually 5; None weighs all timesteps alike.

    Raises:
        DminError: the prediction type is none of these, or γ is not positive.
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None = None) -> None:
        self.scheduler = scheduler
        self.kind = self.scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise DminError(
                f"scheduler.prediction_type={self.kind!r}: allowed are epsilon, v_prediction, "
                f"sample. Mend it in the checkpoint's scheduler/scheduler_config.json."
            )
        if snr_gamma is not None and snr_gamma <= 0:
            raise DminError(f"snr_gamma={snr_gamma}: give a positive number (5 is usual) or null.")
        self.snr_gamma = snr_gamma
        self.ladder = range(self.scheduler.config.num_train_timesteps - 1, -1, -1)

    def __call__(self, x0: Tensor, noise: Tensor, t: Tensor) -> Noised:
        """Return noised examples, their targets and weights.

        Args:
            x0: ``[batch, ...]``.
            noise: standard normal, as x0.
            t: ``[batch]``, from the ladder.
        """
        t = t.long()
        sample = self.scheduler.add_noise(x0, noise, t)
        if self.kind == "epsilon":
            target = noise
        elif self.kind == "v_prediction":
            target = self.scheduler.get_velocity(x0, noise, t)
        else:
            target = x0
        return Noised(sample, target, self._weight(t, x0))

    def _weight(self, t: Tensor, like: Tensor) -> Tensor:
        if self.snr_gamma is None:
            return like.new_ones(len(like))
        alpha = self.scheduler.alphas_cumprod.to(like)[t]
        snr = alpha / (1 - alpha)
        clipped = snr.clamp(max=self.snr_gamma)
        if self.kind == "epsilon":
            return torch.where(snr > 0, clipped / snr, 1)  # at a terminal SNR of zero: its limit
        return clipped / (snr + 1) if self.kind == "v_prediction" else clipped

    def variance_bound(
        self, x0: Tensor, sample: Tensor, t: Tensor, prediction: Tensor, values: Tensor
    ) -> Tensor:
        """Return the variational bound that trains a learned variance, ``[batch]``.

        ``KL(q(x_{t−1}|x_t, x0) ‖ N(μ, Σ))`` in bits a pixel, with
        ``log Σ = v log β_t + (1−v) log β̃_t``; at t = 0 the likelihood of x0, as of 8-bit pixels.
        The mean μ is held fixed: the bound trains the variance alone (Nichol & Dhariwal 2021,
        arXiv 2102.09672, eq. 14 to 16, and the published training code of DiT).

        Args:
            x0: ``[batch, ...]``.
            sample: x_t.
            t: ``[batch]``, from the ladder.
            prediction: of ε, v or x0; no gradient flows into it.
            values: 2v − 1, as x0: what the network says of the variance.
        """
        t = t.long()
        step = _Step.at(t, self.scheduler, x0)
        noise_level = (1 - step.alpha_bar).sqrt()
        prediction = prediction.detach()
        if self.kind == "epsilon":
            x0_predicted = (sample - noise_level * prediction) / step.alpha_bar.sqrt()
        elif self.kind == "v_prediction":
            x0_predicted = step.alpha_bar.sqrt() * sample - noise_level * prediction
        else:
            x0_predicted = prediction
        mean, true_mean = (step.mean(x, sample) for x in (x0_predicted, x0))
        share = (values + 1) / 2
        log_variance = share * step.beta.log() + (1 - share) * step.log_posterior
        ratio = step.log_posterior - log_variance
        distance = (true_mean - mean).square() * torch.exp(-log_variance)
        kl = 0.5 * (torch.exp(ratio) - ratio - 1 + distance)
        last = -_pixel_log_likelihood(x0, mean, torch.exp(0.5 * log_variance))
        nats = torch.where((t == 0).view(step.beta.shape), last, kl)
        return nats.flatten(1).mean(1) / math.log(2)

    def log_snr(self, timesteps: Sequence[float]) -> list[float]:
        """Return ``log(ᾱ_t / (1 − ᾱ_t))`` of each timestep."""
        alpha = self.scheduler.alphas_cumprod.double()[torch.tensor(timesteps).long()]
        return torch.log(alpha / (1 - alpha)).tolist()

    def describe(self) -> dict[str, Any]:
        """Return noise schedule, prediction type and weighting, as JSON."""
        config = self.scheduler.config
        names = ("prediction_type", "beta_schedule", "beta_start", "beta_end", "trained_betas")
        found = {name: config.get(name) for name in (*names, "num_train_timesteps")}
        found["rescale_betas_zero_snr"] = config.get("rescale_betas_zero_snr", False)
        return {**found, "snr_gamma": self.snr_gamma}


class _Step(NamedTuple):
    """What one denoising step is made of; each ``[batch, 1, ...]``."""

    beta: Tensor
    alpha_bar: Tensor
    alpha_bar_before: Tensor
    log_posterior: Tensor  # log β̃_t; at t = 0, where it is −∞, that of t = 1

    @classmethod
    def at(cls, t: Tensor, scheduler: Any, like: Tensor) -> _Step:
        """Return the steps at timesteps, as tensors that go with others."""
        beta = scheduler.betas.double()
        bar = torch.cumprod(1 - beta, 0)  # in single precision 1 − ᾱ_0 would be off by 2e-4
        before = torch.cat([bar.new_ones(1), bar[:-1]])
        posterior = beta * (1 - before) / (1 - bar)
        posterior[0] = posterior[1]
        shape = (-1, *[1] * (like.ndim - 1))
        table = torch.stack([beta, bar, before, posterior.log()]).to(like.dtype)
        return cls(*(x.view(shape) for x in to_device(table, like.device)[:, t.to(like.device)]))

    def mean(self, x0: Tensor, sample: Tensor) -> Tensor:
        """Return the mean of x_{t−1} given x0 and x_t."""
        rest = 1 - self.alpha_bar
        return (
            self.alpha_bar_before.sqrt() * self.beta / rest * x0
            + (1 - self.alpha_bar_before) * (1 - self.beta).sqrt() / rest * sample
        )


def _pixel_log_likelihood(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Return the log probability of the 8-bit value around x in [−1, 1] under a normal."""
    standard = torch.distributions.Normal(0.0, 1.0)
    above, below = (standard.cdf((x - mean + side / 255) / deviation) for side in (1, -1))
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()


class FlowTimesteps(tuple[float, ...]):
    """Timesteps of a flow: any of (0, N] is one, not only those of the ladder."""

    __slots__ = ()

    def __contains__(self, t: Any) -> bool:
        """Tell whether the flow has this timestep."""
        return 0 < t <= self[0]


class RectifiedFlow:
    """A rectified flow from image to noise (Liu et al. 2023; Esser et al. 2024).

    ``x_t = (1−σ) x0 + σ ε`` with ``σ = t / N``; the target is the velocity ``ε − x0``. The
    timesteps of the ladder are even in σ, then shifted towards noise: ``σ ← sσ / (1 + (s−1)σ)``.

    Args:
        config: of diffusers' flow-matching scheduler, or of another that samples flows.
        shift: s; None for the scheduler's, which is 1 where it depends on the resolution.
        target: ``velocity``, or ``noise``: what DMin's published code compares SD3's output with.

    Raises:
        DminError: the scheduler is not one of flows, or s is not positive.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        shift: float | None = None,
        target: Literal["velocity", "noise"] = "velocity",
    ) -> None:
        kind = config.get("prediction_type", "flow_prediction")
        if kind != "flow_prediction":
            raise DminError(
                f"scheduler.prediction_type={kind!r}: this family predicts the velocity of a flow. "
                f"Use a FlowMatchEulerDiscreteScheduler, or flow_prediction, in the checkpoint's "
                f"scheduler/scheduler_config.json."
            )
        own = 1.0 if config.get("use_dynamic_shifting") else config.get("shift")
        own = config.get("flow_shift", 1.0) if own is None else own
        self.shift = float(own if shift is None else shift)
        if self.shift <= 0:
            raise DminError(f"shift={shift}: give a positive number, or null for the scheduler's.")
        self.target = target
        self.num = int(config["num_train_timesteps"])
        even = [step / self.num for step in range(self.num, 0, -1)]
        shifted = (self.shift * s / (1 + (self.shift - 1) * s) for s in even)
        self.ladder = FlowTimesteps(self.num * s for s in shifted)

    def __call__(self, x0: Tensor, noise: Tensor, t: Tensor) -> Noised:
        """Return noised examples, their targets and weights of one.

        Args:
            x0: ``[batch, ...]``.
            noise: standard normal, as x0.
            t: ``[batch]``, in (0, N].
        """
        sigma = (t.to(x0) / self.num).view(-1, *[1] * (x0.ndim - 1))
        target = noise - x0 if self.target == "velocity" else noise
        return Noised((1 - sigma) * x0 + sigma * noise, target, x0.new_ones(len(x0)))

    def log_snr(self, timesteps: Sequence[float]) -> list[float]:
        """Return ``log((1−σ)² / σ²)`` of each timestep; −∞ for pure noise."""
        sigma = torch.tensor(timesteps, dtype=torch.float64) / self.num
        return (2 * torch.log((1 - sigma) / sigma)).tolist()

    def describe(self) -> dict[str, Any]:
        """Return target and number of timesteps, as JSON; the shift only moves timesteps."""
        return {"target": self.target, "num_train_timesteps": self.num}
