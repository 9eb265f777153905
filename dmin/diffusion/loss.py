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
    """Settings of a training script's loss that differ from the plain squared error.

    Args:
        snr_gamma: γ of the min-SNR weight (Hang et al. 2023), usually 5, for discrete diffusion:
            ``min(SNR, γ)`` on the error of x0; ``min(SNR, γ) / SNR`` for a model that predicts ε,
            ``min(SNR, γ) / (SNR + 1)`` for one that predicts v. None: equal weights.
        weighting: weight of a timestep. ``x0`` gives the squared error of x0: σ² for a flow
            (``precondition_outputs`` of diffusers' SD3 script), c_out² for EDM (its SDXL script),
            1/SNR for ε, 1 − ᾱ for v. Only for flows: ``sigma_sqrt`` is σ⁻²; ``cosmap`` is
            ``2/(π(1 − 2σ + 2σ²))`` (Esser et al. 2024, arXiv 2403.03206, app. B). None: 1.
        noise_offset: o; ε becomes ``ε + o z`` in x_t and in the target, with one standard normal
            z per channel (``--noise_offset`` of diffusers and kohya; Guttenberg 2023).
        input_perturbation: p; x_t uses ``ε + p z``, the target uses ε
            (``--input_perturbation``; kohya's ``ip_noise_gamma``; Ning et al. 2023, arXiv
            2301.11706).
        loss_type: ``l2``; ``huber``: ``2c (√(d² + c²) − c)`` of the error d; ``smooth_l1``: the
            same without the leading factor c (both as in diffusers' and kohya's scripts).
        huber_c: c, the base value.
        huber_schedule: the value used at timestep t of N: ``snr``: ``(1−c)/(1+s)² + c`` with
            s = √((1−ᾱ)/ᾱ), for discrete diffusion; ``exponential``: ``c^(t/N)``; ``constant``: c.
    """

    snr_gamma: float | None = None
    weighting: Weighting | None = None
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    loss_type: LossType = "l2"
    huber_c: float = 0.1
    huber_schedule: HuberSchedule = "snr"

    def check(self) -> LossSettings:
        """Return these settings if all are valid.

        Raises:
            DminError: names the invalid setting and the allowed values.
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
                allowed = "a positive number" if name == "huber_c" else "0 or a positive number"
                raise DminError(f"model.{name}={value}: give {allowed}; 0.1 is usual.")
        return self

    def describe(self) -> dict[str, Any]:
        """Return non-default settings (all for a robust loss), except ``snr_gamma``."""
        found = self._asdict()
        del found["snr_gamma"]
        if self.loss_type == "l2":  # which uses neither of these two
            del found["huber_c"], found["huber_schedule"]
            default = self._field_defaults
            return {name: value for name, value in found.items() if value != default[name]}
        return found

    def noises(self, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise of x_t and the noise of the target.

        Offset and perturbation are drawn with the noise as key: equal noise, equal additions.

        Args:
            noise: standard normal, ``[batch, channels, ...]``.
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
        """Return the Huber loss of each error; c broadcasts with the errors."""
        smooth = 2 * ((error.square() + c**2).sqrt() - c)
        return c * smooth if self.loss_type == "huber" else smooth


def _more(name: str, noise: Tensor, t: Tensor, shape: Any) -> Tensor:
    """Return standard normal numbers per example; equal noise and timestep give equal numbers.

    The key is the noise's middle value, which fields of several shapes share. The sign of the
    result is the sign of that value, so that antithetic noise gives antithetic additions.
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
