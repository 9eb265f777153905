"""Schedules of the timesteps at which gradients are computed.

A schedule picks from the timesteps of a model, all of them in the order of sampling, from
pure noise down to the image (999, 998, …, 0 for a DDPM).
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

from dmin.runtime.errors import DminError

LogSNRs = Callable[[Sequence[float]], Sequence[float]]
"""Maps timesteps to a model's log signal-to-noise ratios ``log(α²/σ²)``."""


class Schedule(ABC):
    """A rule that chooses timesteps of a model, in the model's unit, noisiest first."""

    def bind(self, log_snr: LogSNRs | None) -> Self:
        """Return this schedule for a model; most schedules need only the model's timesteps.

        Args:
            log_snr: the model's log-SNR function, if it has one.
        """
        return self

    @abstractmethod
    def choose(self, timesteps: Sequence[float]) -> tuple[float, ...]:
        """Return the timesteps chosen from the model's timesteps."""

    def __call__(self, timesteps: Sequence[float]) -> tuple[float, ...]:
        """Return the chosen timesteps, after checking that they are distinct.

        Raises:
            DminError: a timestep is chosen twice, so that it would count twice.
        """
        chosen = self.choose(timesteps)
        if len(set(chosen)) != len(chosen):
            raise DminError(
                f"timesteps={list(chosen)} contain duplicates: {len(chosen)} were requested of "
                f"the model's {len(timesteps)}. Set timesteps.num lower, or list each once."
            )
        return chosen


class Stratified(Schedule):
    """The middles of ``num`` equal parts of all timesteps: even coverage of all noise levels.

    The default. Ten of a DDPM's thousand timesteps are t = 949, 849, …, 49.

    Args:
        num: T, the number of timesteps.
    """

    def __init__(self, num: int = 10) -> None:
        self.num: int = _positive(num)

    def choose(self, timesteps: Sequence[float]) -> tuple[float, ...]:
        """Return the timestep in the middle of each part."""
        size = len(timesteps) / self.num
        return tuple(timesteps[int((part + 0.5) * size)] for part in range(self.num))


class LogSNR(Schedule):
    """The timesteps nearest to the middles of ``num`` equal parts of the model's log-SNR range.

    As a function of ``λ(t) = log(α_t²/σ_t²)`` the diffusion loss does not depend on the noise
    schedule (Kingma et al. 2021, "Variational Diffusion Models"). Timesteps with infinite λ (pure
    noise or pure image) are left out. If two parts have the same nearest timestep, the second one
    takes the nearest that is free.

    Args:
        num: T, the number of timesteps.
    """

    def __init__(self, num: int = 10) -> None:
        self.num: int = _positive(num)
        self._log_snr: LogSNRs | None = None

    def bind(self, log_snr: LogSNRs | None) -> Self:
        """Return this schedule with the model's log-SNR function.

        Raises:
            DminError: the model has no such function.
        """
        if log_snr is None:
            raise DminError(
                "timesteps=log_snr needs a model with a method log_snr(timesteps), which this one "
                "does not have. Use timesteps=stratified, or add the method to the model."
            )
        bound = copy.copy(self)
        bound._log_snr = log_snr
        return bound

    def choose(self, timesteps: Sequence[float]) -> tuple[float, ...]:
        """Return the free timestep nearest to the middle of each part, noisiest first.

        Raises:
            DminError: there are fewer timesteps with finite log-SNR than parts.
        """
        if self._log_snr is None:
            raise RuntimeError("call schedule.bind(model.log_snr) first")
        ratios = dict(zip(timesteps, map(float, self._log_snr(timesteps)), strict=True))
        free = {t: ratio for t, ratio in ratios.items() if math.isfinite(ratio)}
        if len(free) < self.num:
            raise DminError(
                f"timesteps.num={self.num}, but the model has {len(free)} timesteps of finite "
                f"log-SNR. Set timesteps.num lower."
            )
        low, high = min(free.values()), max(free.values())
        for part in range(self.num):
            middle = low + (high - low) * (part + 0.5) / self.num
            free.pop(min(free, key=lambda t: abs(free[t] - middle)))
        return tuple(t for t in ratios if math.isfinite(ratios[t]) and t not in free)


class DMinCubic(Schedule):
    """The published schedule of DMin: positions ``⌊N·(i/T)³⌋``, most of them at almost pure noise.

    Ten of a DDPM's thousand timesteps are t = 999, 998, 991, 972, 935, 874, 783, 656, 487, 270.
    At most of these the gradients hardly depend on the image. The schedule is provided to
    reproduce the paper (arXiv 2412.08637, published code).

    Args:
        num: T, the number of timesteps.
        skip_first: skip position 0 and end at the last position, as the published code does for
            SD 1.x. Its PNDM sampler repeats the second timestep, so all later positions are one
            earlier: t = 998, 992, 973, 936, 875, 784, 657, 488, 271, 0.
    """

    def __init__(self, num: int = 10, skip_first: bool = False) -> None:
        self.num: int = _positive(num)
        self.skip_first = skip_first

    def choose(self, timesteps: Sequence[float]) -> tuple[float, ...]:
        """Return the timesteps at the chosen positions."""
        steps = range(1, self.num + 1) if self.skip_first else range(self.num)
        places = [len(timesteps) * step**3 // self.num**3 for step in steps]
        if self.skip_first:
            places = [max(min(1, place), place - 1) for place in places]
        return tuple(timesteps[place] for place in places)


class Explicit(Schedule):
    """The given timesteps.

    Args:
        values: in the model's unit; they are sorted in descending order.
    """

    def __init__(self, values: Sequence[float]) -> None:
        if not values:
            raise DminError("timesteps.values=[]: name at least one timestep, e.g. [500].")
        self.values: tuple[float, ...] = tuple(sorted(values, reverse=True))

    def choose(self, timesteps: Sequence[float]) -> tuple[float, ...]:
        """Return the timesteps, after checking that the model has each of them."""
        unknown = [value for value in self.values if value not in timesteps]
        if unknown:
            raise DminError(
                f"timesteps.values has {unknown}, which the model does not have: its timesteps run "
                f"from {min(timesteps)} to {max(timesteps)} ({len(timesteps)} of them)."
            )
        return self.values


def _positive(num: int) -> int:
    if num < 1:
        raise DminError(f"timesteps.num={num}: at least one timestep is needed, 10 is usual.")
    return num
