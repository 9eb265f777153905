"""Base class of the noising processes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from dmin.diffusion.loss import LossSettings
from dmin.runtime.errors import DminError


class Noised(NamedTuple):
    """Noised examples, the targets of the prediction, and the weights of the losses."""

    sample: Tensor  # x_t, shape of x0
    target: Tensor  # shape of x0
    weight: Tensor  # [batch], of each example's loss


class Levels(NamedTuple):
    """α and σ of ``x_t = α x0 + σ ε``, each ``[batch, 1, ...]``."""

    alpha: Tensor
    sigma: Tensor


class ContinuousTimesteps(tuple[float, ...]):
    """Timesteps of a continuous process: ``in`` accepts every t from the first to the last.

    Args:
        values: the timesteps to choose from, in descending order.
        zero: accept every t > 0 up to the first (not t = 0, where there is no noise).
    """

    zero: bool

    def __new__(cls, values: Iterable[float], zero: bool = False) -> Self:
        """Return the timesteps."""
        made = super().__new__(cls, values)
        made.zero = zero
        return made

    def __contains__(self, t: Any) -> bool:
        """Return whether t is in the range of the process."""
        return (t > 0 if self.zero else self[-1] <= t) and t <= self[0]


class Process(ABC):
    """A noising process ``x_t = α_t x0 + σ_t ε``, with the network's inputs and its target.

    Attributes:
        timesteps: all timesteps in the order of sampling, noisiest first, in the model's unit.
    """

    timesteps: Sequence[float]
    settings: LossSettings = LossSettings()
    allowed: ClassVar[dict[str, tuple[Any, ...]]]
    """The loss settings that depend on the process, with the values it allows."""

    def trained_with(self, settings: LossSettings) -> Self:
        """Set the loss of a training script, and return this process.

        Raises:
            DminError: a setting is invalid, or this process does not allow it.
        """
        self.settings = settings.check()
        for name, values in self.allowed.items():
            value = getattr(settings, name)
            used = name != "huber_schedule" or settings.loss_type != "l2"
            if used and value is not None and value not in values:
                raise DminError(
                    f"model.{name}={value}: this checkpoint is a {type(self).__name__}, by its "
                    f"scheduler, which does not have this setting. Allowed are "
                    f"{', '.join(map(str, values)) or 'only null'}."
                )
        return self

    def __call__(self, x0: Tensor, noise: Tensor, t: Tensor) -> Noised:
        """Return noised examples, their targets and weights.

        Args:
            x0: ``[batch, ...]``.
            noise: standard normal, shape of x0.
            t: ``[batch]``, in the model's unit.
        """
        levels = self.levels(t, x0)
        noise, of_target = self.settings.noises(noise, t)
        sample = levels.alpha * x0 + levels.sigma * noise
        return Noised(sample, self._target(levels, x0, of_target), self._weight(levels, len(x0)))

    def loss(self, noised: Noised, prediction: Tensor, t: Tensor) -> Tensor | None:
        """Return each example's robust loss, ``[batch]``; None if the loss is the squared error.

        Args:
            noised: the noised examples.
            prediction: the network's output, shape of x0.
            t: ``[batch]``, in the model's unit.
        """
        settings = self.settings
        if settings.loss_type == "l2":
            return None
        c = torch.full_like(t, settings.huber_c, dtype=prediction.dtype)
        if settings.huber_schedule == "exponential":
            c = c ** (t / len(self.timesteps))
        elif settings.huber_schedule == "snr":
            levels = self.levels(t, prediction)
            ratio = (levels.sigma / levels.alpha).flatten()
            c = (1 - settings.huber_c) / (1 + ratio) ** 2 + settings.huber_c
        error = (prediction - noised.target).flatten(1)
        return noised.weight * settings.bounded(error, c[:, None]).mean(1)

    @abstractmethod
    def levels(self, t: Tensor, like: Tensor) -> Levels:
        """Return α and σ at timesteps t, shaped to broadcast with ``like``, in its dtype."""

    @abstractmethod
    def x0(self, levels: Levels, sample: Tensor, output: Tensor) -> Tensor:
        """Return the x0 that the network's output implies, by solving the target for x0."""

    def optimum(self, x0: Tensor, sample: Tensor, t: Tensor) -> Tensor:
        """Return the output of the optimal network for a data set of one example: loss zero.

        Args:
            x0: that example, ``[1, ...]``.
            sample: x_t as the network receives it, ``[batch, ...]``.
            t: ``[batch]``.
        """
        levels = self.levels(t, sample)
        sample = sample / self.network_input(torch.ones_like(sample), t)
        noise = (sample - levels.alpha * x0) / levels.sigma
        return self._target(levels, x0.expand_as(sample), noise)

    def network_input(self, sample: Tensor, t: Tensor) -> Tensor:
        """Return x_t as the network receives it, for example scaled."""
        return sample

    def time(self, t: Tensor) -> Tensor:
        """Return timesteps as the network receives them."""
        return t

    def log_snr(self, timesteps: Sequence[float]) -> list[float]:
        """Return ``log(α² / σ²)`` at each timestep; −∞ for pure noise."""
        alpha, sigma = self.levels(torch.tensor(timesteps), torch.empty(0, dtype=torch.float64))
        return (2 * torch.log(alpha / sigma)).tolist()

    def describe(self) -> dict[str, Any]:
        """Return noise schedule, target and loss settings, as JSON."""
        return {**self._described(), **self.settings.describe()}

    @abstractmethod
    def _described(self) -> dict[str, Any]:
        """Return noise schedule and target."""

    @abstractmethod
    def _target(self, levels: Levels, x0: Tensor, noise: Tensor) -> Tensor:
        """Return the target of the network's output."""

    @abstractmethod
    def _scale(self, levels: Levels) -> Tensor:
        """Return the size of the error in x0 per unit error of the output."""

    def _weight(self, levels: Levels, batch: int) -> Tensor:
        """Return the weight of each example's loss, ``[batch]``."""
        if self.settings.weighting == "x0":
            return self._scale(levels).flatten() ** 2
        return levels.sigma.new_ones(batch)
