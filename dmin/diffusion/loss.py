"""Variants of the squared error in training scripts: weights, additional noise, robust losses."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dmin.diffusion.noise import field, normal
from dmin.runtime.errors import DminError

Weighting = Literal["x0", "sigma_sqrt", "cosmap"]
LossType = Literal["l2", "huber", "smooth_l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]


class LossSettings(NamedTuple):
    """The loss of a training script, where it is not the plain squared error.

    Args:
        snr_gamma: γ of min-SNR (Hang et al. 2023) of a discrete diffusion, usually 5:
            ``min(SNR, γ)`` in units of x0, divided by SNR for ε, by SNR + 1 for v. None for equal
            weights.
        weighting: of a timestep. ``x0`` makes it the squared error of x0: σ² for a flow
            (``precondition_outputs`` of diffusers' script for SD3), c_out² for EDM (its script for
            SDXL), 1/SNR for ε, 1 − ᾱ for v. ``sigma_sqrt``, of flows, is σ⁻²; ``cosmap``
            ``2/(π(1 − 2σ + 2σ²))`` (Esser et al. 2024, arXiv 2403.03206, app. B). None for 1.
        noise_offset: o; ε becomes ``ε + o z`` with one standard normal z a channel, in x_t and in
            the target (``--noise_offset`` of diffusers' and kohya's scripts; Guttenberg 2023).
        input_perturbation: p; x_t is made with ``ε + p z``, the target with ε
            (``--input_perturbation``; kohya's ``ip_noise_gamma``; Ning et al. 2023, arXiv
            2301.11706).
        loss_type: ``l2``; ``huber``: ``2c (√(d² + c²) − c)`` of the error d; ``smooth_l1``: the
            same without the factor c (both of diffusers' and kohya's scripts).
        huber_c: base of c.
        huber_schedule: c of a timestep: ``snr``: ``(1−c)/(1+s)² + c`` with s = √((1−ᾱ)/ᾱ), of
            a discrete diffusion; ``exponential``: ``c^(t/N)``; ``constant``: c.
    """

    snr_gamma: float | None = None
    weighting: Weighting | None = None
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    loss_type: LossType = "l2"
    huber_c: float = 0.1
    huber_schedule: HuberSchedule = "snr"

    def check(self) -> LossSettings:
        """Return these settings.

        Raises:
            DminError: one of them is none that there is.
        """
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise DminError(
                f"snr_gamma={self.snr_gamma}: give a positive number (5 is usual) or null."
            )
        if self.snr_gamma is not None and self.weighting is not None:
            raise DminError(
                f"model.snr_gamma={self.snr_gamma} with model.weighting={self.weighting}: both "
                f"weight timesteps. Set one of them to null."
            )
        choices: tuple[tuple[str, Any, Any], ...] = (
            ("weighting", self.weighting, (None, *get_args(Weighting))),
            ("loss_type", self.loss_type, get_args(LossType)),
            ("huber_schedule", self.huber_schedule, get_args(HuberSchedule)),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise DminError(
                    f"model.{name}={value!r}: allowed are {', '.join(map(str, allowed))}."
                )
        for name in ("noise_offset", "input_perturbation", "huber_c"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (name == "huber_c" and not value):
                raise DminError(f"model.{name}={value}: give a positive number; 0.1 is usual.")
        return self

    def describe(self) -> dict[str, Any]:
        """Return what is off its default, but min-SNR's γ, which stands with the process."""
        found = self._asdict()
        del found["snr_gamma"]
        if self.loss_type == "l2":  # these two then mean nothing
            del found["huber_c"], found["huber_schedule"]
            default = self._field_defaults
            return {name: value for name, value in found.items() if value != default[name]}
        return found

    def noises(self, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise of x_t and that of the target.

        What is added is decided by the noise itself, so that examples of one noise share it.

        Args:
            noise: standard normal, ``[batch, ...]``.
            t: ``[batch]``.
        """
        if self.noise_offset:
            ones = [1] * (noise.ndim - 2)
            noise = noise + self.noise_offset * _more("offset", noise, t, [noise.shape[1], *ones])
        if not self.input_perturbation:
            return noise, noise
        more = _more("perturbation", noise, t, noise.shape[1:])
        return noise + self.input_perturbation * more, noise

    def bounded(self, error: Tensor, c: Tensor) -> Tensor:
        """Return the Huber loss of errors; c goes with them."""
        smooth = 2 * ((error.square() + c**2).sqrt() - c)
        return c * smooth if self.loss_type == "huber" else smooth


def _more(name: str, noise: Tensor, t: Tensor, shape: Any) -> Tensor:
    """Return standard normal numbers for each example, the same for the same noise and timestep.

    The value in the middle stands for the noise: fields of noise of several shapes share it. They
    change their sign with it, as antithetic draws do.
    """
    middle = noise[:, 0]
    for size in noise.shape[2:]:
        middle = middle[:, size // 2]
    draw = field if len(shape) == 3 and max(shape[1:]) > 1 else normal
    drawn: dict[str, Tensor] = {}
    rows = []
    for value, at in zip(middle.tolist(), t.tolist(), strict=True):
        key = f"{name} {abs(value)!r} {float(at)!r}"
        if key not in drawn:
            drawn[key] = draw(tuple(shape), key)
        rows.append(drawn[key] if value >= 0 else -drawn[key])
    return torch.stack(rows).to(noise)
