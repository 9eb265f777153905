"""Noising processes, with the targets that models are trained to predict."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dmin.diffusion.loss import LossSettings
from dmin.diffusion.process import ContinuousTimesteps, Levels, Process
from dmin.diffusion.variance import variance_bound
from dmin.runtime.errors import DminError


class DiscreteDiffusion(Process):
    """A variance-preserving diffusion in discrete timesteps (Ho et al. 2020).

    ``x_t = √ᾱ_t x0 + √(1−ᾱ_t) ε`` with ᾱ from the scheduler. Its ``prediction_type`` selects the
    target: ε, v = √ᾱ_t ε − √(1−ᾱ_t) x0 (Salimans & Ho 2022), or x0. With γ, losses have the
    min-SNR weight (Hang et al. 2023): ``min(SNR, γ)`` for x0, divided by SNR for ε, and by
    SNR + 1 for v.

    Args:
        scheduler: a diffusers scheduler with ``alphas_cumprod``, ``betas`` (both ``[timesteps]``)
            and ``config``.
        snr_gamma: γ, usually 5; None gives all timesteps equal weight.

    Raises:
        DminError: the prediction type is none of these, or γ is not positive.
    """

    allowed: ClassVar[dict[str, tuple[Any, ...]]] = {"weighting": ("x0",)}

    def __init__(self, scheduler: Any, snr_gamma: float | None = None) -> None:
        self.scheduler = scheduler
        self.kind: str = scheduler.config.get("prediction_type", "epsilon")
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise DminError(
                f"scheduler.prediction_type={self.kind!r}: allowed are epsilon, v_prediction, "
                f"sample. Fix it in the checkpoint's scheduler/scheduler_config.json."
            )
        self.settings: LossSettings = LossSettings(snr_gamma).check()
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod
        self.timesteps: Sequence[float] = range(len(self.alphas_cumprod) - 1, -1, -1)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def levels(self, t: Tensor, like: Tensor) -> Levels:
        """Return ``√ᾱ_t`` and ``√(1−ᾱ_t)``."""
        key = like.device, like.dtype
        if key not in self._tables:
            self._tables[key] = self.alphas_cumprod.to(like)
        bar = self._tables[key][t.long()].view(-1, *[1] * (like.ndim - 1))
        return Levels(bar**0.5, (1 - bar) ** 0.5)

    def x0(self, levels: Levels, sample: Tensor, output: Tensor) -> Tensor:
        """Return the x0 that the network's output implies."""
        if self.kind == "epsilon":
            return (sample - levels.sigma * output) / levels.alpha
        return levels.alpha * sample - levels.sigma * output if self.kind != "sample" else output

    def time(self, t: Tensor) -> Tensor:
        """Return timesteps as integers, because some networks look them up in a table."""
        return t.long()

    def variance_bound(
        self, x0: Tensor, sample: Tensor, t: Tensor, prediction: Tensor, values: Tensor
    ) -> Tensor:
        """Return the bound that trains a learned variance, ``[batch]``.

        See :func:`~dmin.diffusion.variance.variance_bound`.

        Args:
            x0: ``[batch, ...]``.
            sample: x_t.
            t: ``[batch]``, in the model's unit.
            prediction: predicted ε, v or x0; detached here.
            values: 2v − 1, shape of x0: the network's output for the variance.
        """
        betas = self.scheduler.betas
        bar = torch.cumprod(1 - betas.double(), 0).to(x0)[t.long()].view(-1, *[1] * (x0.ndim - 1))
        predicted = self.x0(Levels(bar.sqrt(), (1 - bar).sqrt()), sample, prediction.detach())
        return variance_bound(betas, x0, sample, t, predicted, values)

    def _described(self) -> dict[str, Any]:
        config = self.scheduler.config
        names = ("beta_schedule", "beta_start", "beta_end", "trained_betas")
        found = {"prediction_type": self.kind, **{name: config.get(name) for name in names}}
        found["num_train_timesteps"] = len(self.timesteps)
        found["rescale_betas_zero_snr"] = config.get("rescale_betas_zero_snr", False)
        if config.get("snr_shift_scale", 1) != 1:
            found["snr_shift_scale"] = config["snr_shift_scale"]
        return {**found, "snr_gamma": self.settings.snr_gamma}

    def _target(self, levels: Levels, x0: Tensor, noise: Tensor) -> Tensor:
        if self.kind == "epsilon":
            return noise
        return levels.alpha * noise - levels.sigma * x0 if self.kind == "v_prediction" else x0

    def _scale(self, levels: Levels) -> Tensor:
        if self.kind == "epsilon":
            return levels.sigma / levels.alpha
        return levels.sigma if self.kind == "v_prediction" else torch.ones_like(levels.sigma)

    def _weight(self, levels: Levels, batch: int) -> Tensor:
        if self.settings.snr_gamma is None:
            return super()._weight(levels, batch)
        snr = (levels.alpha / levels.sigma).flatten() ** 2
        clipped = snr.clamp(max=self.settings.snr_gamma)
        if self.kind == "epsilon":
            return torch.where(snr > 0, clipped / snr, 1)  # the limit at zero terminal SNR
        return clipped / (snr + 1) if self.kind == "v_prediction" else clipped


class EDM(Process):
    """A variance-exploding diffusion with a preconditioned network (Karras et al. 2022).

    ``x_t = x0 + σ ε``; the network receives ``c_in x_t`` and ``t = ln σ / 4``. Its output F stands
    for ``x0 = c_skip x_t + c_out F``, with ``s² = σ² + σ_d²``, ``c_in = 1/s``,
    ``c_skip = σ_d²/s²``, ``c_out = ±σσ_d/s``: plus for ``epsilon``, minus for ``v_prediction``.
    The target is ``(x0 − c_skip x_t) / c_out``. The loss, the squared error of F, is that of x0
    with Karras' weight ``s²/(σσ_d)²`` (arXiv 2206.00364, eq. 7 and 8, table 1).

    Args:
        timesteps: ``ln σ / 4`` in the order of sampling.
        sigma_data: σ_d, the standard deviation of the data.
        kind: ``epsilon`` or ``v_prediction``; selects the sign of c_out.

    Raises:
        DminError: the prediction type is neither of these, or σ_d is not positive.
    """

    allowed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "snr_gamma": (),
        "weighting": ("x0",),
        "huber_schedule": ("constant",),
    }

    def __init__(self, timesteps: Iterable[float], sigma_data: float, kind: str) -> None:
        if kind not in ("epsilon", "v_prediction"):
            raise DminError(
                f"scheduler.prediction_type={kind!r}: with Karras' preconditioning, allowed are "
                f"epsilon and v_prediction. Fix it in scheduler/scheduler_config.json."
            )
        self.kind = kind
        self.sigma_data: float = float(sigma_data)
        if not self.sigma_data > 0:
            raise DminError(
                f"scheduler.sigma_data={sigma_data}: give a positive number, the standard "
                "deviation of the data. Fix it in the checkpoint's scheduler/scheduler_config.json."
            )
        self.timesteps: Sequence[float] = ContinuousTimesteps(timesteps)

    def levels(self, t: Tensor, like: Tensor) -> Levels:
        """Return 1 and σ."""
        sigma = torch.exp(4 * t.to(like)).view(-1, *[1] * (like.ndim - 1))
        return Levels(torch.ones_like(sigma), sigma)

    def network_input(self, sample: Tensor, t: Tensor) -> Tensor:
        """Return ``c_in x_t``."""
        return sample / self._spread(self.levels(t, sample).sigma)

    def x0(self, levels: Levels, sample: Tensor, output: Tensor) -> Tensor:
        """Return ``c_skip x_t + c_out F``."""
        data, spread = self.sigma_data, self._spread(levels.sigma)
        return (data / spread) ** 2 * sample + self._scale(levels) * output

    def _described(self) -> dict[str, Any]:
        return {"process": "edm", "prediction_type": self.kind, "sigma_data": self.sigma_data}

    def _target(self, levels: Levels, x0: Tensor, noise: Tensor) -> Tensor:
        data, spread = self.sigma_data, self._spread(levels.sigma)
        return self._sign * (levels.sigma / data * x0 - data * noise) / spread

    def _scale(self, levels: Levels) -> Tensor:
        return self._sign * levels.sigma * self.sigma_data / self._spread(levels.sigma)

    def _spread(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2).sqrt()

    @property
    def _sign(self) -> int:
        return 1 if self.kind == "epsilon" else -1


class RectifiedFlow(Process):
    """A rectified flow from image to noise (Liu et al. 2023; Esser et al. 2024).

    ``x_t = (1−σ) x0 + σ ε`` with ``σ = t / N``; the target is the velocity ``ε − x0``. The
    timesteps are equidistant in σ and then shifted towards noise: ``σ ← sσ / (1 + (s−1)σ)``.

    Args:
        config: config of diffusers' flow-matching scheduler, or of another scheduler for flows.
        shift: s; None takes the scheduler's, or 1 if the scheduler's depends on the resolution.
        target: ``velocity``, or ``noise``, which DMin's published code uses as target for SD3.

    Raises:
        DminError: the scheduler is not for flows, or s is not positive.
    """

    allowed: ClassVar[dict[str, tuple[Any, ...]]] = {
        "snr_gamma": (),
        "weighting": ("x0", "sigma_sqrt", "cosmap"),
        "huber_schedule": ("exponential", "constant"),
    }

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
        self.shift: float = float(own if shift is None else shift)
        if not self.shift > 0:
            raise DminError(
                f"shift={self.shift}: give a positive number, or null for the scheduler's."
            )
        self.target = target
        self.num: int = int(config["num_train_timesteps"])
        even = [step / self.num for step in range(self.num, 0, -1)]
        shifted = (self.shift * s / (1 + (self.shift - 1) * s) for s in even)
        self.timesteps: Sequence[float] = ContinuousTimesteps(
            (self.num * s for s in shifted), zero=True
        )

    def levels(self, t: Tensor, like: Tensor) -> Levels:
        """Return ``1 − σ`` and ``σ``."""
        sigma = (t.to(like) / self.num).view(-1, *[1] * (like.ndim - 1))
        return Levels(1 - sigma, sigma)

    def x0(self, levels: Levels, sample: Tensor, output: Tensor) -> Tensor:
        """Return ``x_t − σ v``."""
        return sample - levels.sigma * output

    def _described(self) -> dict[str, Any]:
        return {"target": self.target, "num_train_timesteps": self.num}

    def _target(self, levels: Levels, x0: Tensor, noise: Tensor) -> Tensor:
        return noise - x0 if self.target == "velocity" else noise

    def _scale(self, levels: Levels) -> Tensor:
        return levels.sigma

    def _weight(self, levels: Levels, batch: int) -> Tensor:
        sigma = levels.sigma.flatten()
        if self.settings.weighting == "sigma_sqrt":
            return sigma**-2
        if self.settings.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        return super()._weight(levels, batch)
