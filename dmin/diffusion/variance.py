"""The variational bound that trains a learned variance (Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dmin.runtime.transfer import to_device


def variance_bound(
    betas: Tensor, x0: Tensor, sample: Tensor, t: Tensor, x0_predicted: Tensor, values: Tensor
) -> Tensor:
    """Return the variational bound of each example, ``[batch]``, in bits per pixel.

    ``KL(q(x_{t−1}|x_t, x0) ‖ N(μ, Σ))`` with ``log Σ = v log β_t + (1−v) log β̃_t``; at t = 0 the
    negative log-likelihood of x0 as 8-bit pixels. The mean μ must be detached, since the bound
    trains only the variance (arXiv 2102.09672, eq. 14 to 16, and DiT's published training code).

    Args:
        betas: β of all timesteps, ``[timesteps]``.
        x0: ``[batch, ...]``.
        sample: x_t, shape of x0.
        t: ``[batch]``, in the model's unit.
        x0_predicted: the x0 that the detached prediction implies, shape of x0.
        values: 2v − 1, shape of x0: the network's output for the variance.
    """
    step = _Step.at(t.long(), betas, x0)
    mean, true_mean = (step.mean(x, sample) for x in (x0_predicted, x0))
    share = (values + 1) / 2
    log_variance = share * step.beta.log() + (1 - share) * step.log_posterior
    ratio = step.log_posterior - log_variance
    distance = (true_mean - mean).square() * torch.exp(-log_variance)
    kl = 0.5 * (torch.exp(ratio) - ratio - 1 + distance)
    last = -_pixel_log_likelihood(x0, mean, torch.exp(0.5 * log_variance))
    nats = torch.where((t == 0).view(step.beta.shape), last, kl)
    return nats.flatten(1).mean(1) / math.log(2)


class _Step(NamedTuple):
    """The coefficients of one denoising step; each ``[batch, 1, ...]``."""

    beta: Tensor
    alpha_bar: Tensor
    alpha_bar_before: Tensor
    log_posterior: Tensor  # log β̃_t; for t = 0, where it would be −∞, the value at t = 1

    @classmethod
    def at(cls, t: Tensor, betas: Tensor, like: Tensor) -> _Step:
        """Return the coefficients at timesteps t, shaped to broadcast with ``like``."""
        beta = betas.double()
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
    """Return the log probability of the 8-bit bin around x in [−1, 1] under a normal."""
    standard = torch.distributions.Normal(0.0, 1.0)
    above, below = (standard.cdf((x - mean + side / 255) / deviation) for side in (1, -1))
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()
