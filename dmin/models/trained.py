"""A diffusers network with the process and the loss that it was trained with."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, get_type_hints

from torch import Tensor

from dmin.diffusion.loss import HuberSchedule, LossSettings, LossType, Weighting
from dmin.diffusion.process import Noised, Process
from dmin.diffusion.processes import EDM, DiscreteDiffusion, RectifiedFlow
from dmin.models.adapters import describe_adapters
from dmin.models.base import DiffusionModel, Prediction
from dmin.models.relatives import FAMILIES, Claims
from dmin.models.schedulers import process_of
from dmin.runtime.errors import DminError


class TrainedModel(DiffusionModel):
    """A model whose process is that of a scheduler.

    Args:
        scheduler: of the training.
        snr_gamma: weighs losses by min-SNR with this γ (Hang et al. 2023), if a discrete diffusion
            was trained so; None for equal weights. This and the next six are told in full at
            :class:`~dmin.diffusion.loss.LossSettings`.
        weighting: ``x0``, or ``sigma_sqrt`` and ``cosmap`` of flows; None for equal weights.
        noise_offset: added to the noise, the same for all pixels of a channel.
        input_perturbation: of more noise in the input alone.
        loss_type: ``l2``, ``huber`` or ``smooth_l1``.
        huber_c: below which these two are squared errors.
        huber_schedule: ``snr``, ``exponential`` or ``constant``: its way over the timesteps.
        shift: of a flow's timesteps towards noise; None for the scheduler's. It moves the timesteps
            that schedules choose from, not the loss at a timestep.

    Raises:
        DminError: the process is none of the family's, or has no such loss.
    """

    processes: ClassVar[tuple[type[Process], ...]] = (DiscreteDiffusion, EDM, RectifiedFlow)
    """What networks of the family are trained as."""
    family: ClassVar[str]  # as ``model=`` calls it
    claims: ClassVar[Claims]

    def __init_subclass__(cls) -> None:
        """Enter a class that claims checkpoints among the families."""
        super().__init_subclass__()
        if "claims" in vars(cls):
            FAMILIES[cls.family] = cls

    def __init__(
        self,
        scheduler: Any,
        *,
        snr_gamma: float | None = None,
        weighting: Weighting | None = None,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
        loss_type: LossType = "l2",
        huber_c: float = 0.1,
        huber_schedule: HuberSchedule = "snr",
        shift: float | None = None,
    ) -> None:
        super().__init__()
        loss = (snr_gamma, weighting, noise_offset, input_perturbation, loss_type, huber_c)
        self.process: Any = process_of(scheduler, LossSettings(*loss, huber_schedule), shift)
        if not isinstance(self.process, self.processes):
            raise DminError(
                f"model.path: the {type(scheduler).__name__} of this checkpoint is that of a "
                f"{type(self.process).__name__}, where {type(self).__name__} is trained as "
                f"{' or '.join(kind.__name__ for kind in self.processes)}. Put the scheduler of "
                f"its training in the checkpoint's folder scheduler."
            )
        self.timesteps: Sequence[float] = self.process.timesteps

    def log_snr(self, timesteps: Sequence[float]) -> list[float]:
        """Return the log signal-to-noise ratio at each timestep."""
        found: list[float] = self.process.log_snr(timesteps)
        return found

    def describe(self) -> dict[str, Any]:
        """Return the loss: process, weighting, and what scales the gradients of adapters."""
        adapters = describe_adapters(self.network)
        return {**super().describe(), **self.process.describe(), "adapters": adapters}

    def _judged(
        self, noised: Noised, t: Tensor, prediction: Tensor, bound: Tensor | None = None
    ) -> Prediction:
        """Return a prediction with what it is held to."""
        loss = self.process.loss(noised, prediction, t)
        return Prediction(prediction, noised.target, noised.weight, bound, loss=loss)


def name_settings(family: type, base: type, method: str) -> None:
    """Give a class method of a base its own signature in a family: with all the family's settings.

    The base's method ends in ``**settings`` and passes them to the constructor, and each
    constructor keeps its own and passes the others on. So no signature would tell what a family
    takes; but ``help()`` and the check of configurations ask signatures.

    Args:
        family: gets the method.
        base: defines the method.
        method: name of the class method.
    """
    function = vars(base)[method].__func__
    hints = get_type_hints(function)
    own = [
        p.replace(annotation=hints.get(p.name, p.annotation))
        for p in inspect.signature(function).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]
    settings: dict[str, inspect.Parameter] = {}
    for parent in family.__mro__:
        if issubclass(parent, DiffusionModel) and "__init__" in vars(parent):
            constructor: Any = vars(parent)["__init__"]
            hints = get_type_hints(constructor)
            for p in inspect.signature(constructor).parameters.values():
                if p.kind is p.KEYWORD_ONLY:
                    settings.setdefault(p.name, p.replace(annotation=hints[p.name]))

    @functools.wraps(function)
    def with_settings(cls: type, *args: Any, **given: Any) -> Any:
        return function(cls, *args, **given)

    named: Any = with_settings
    named.__signature__ = inspect.Signature([*own, *settings.values()])
    setattr(family, method, classmethod(named))
