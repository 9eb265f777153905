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
    """A model whose process is determined by a scheduler.

    :class:`~dmin.diffusion.loss.LossSettings` describes the settings of the loss in full.

    Args:
        scheduler: the scheduler of its training.
        snr_gamma: γ of min-SNR weights (Hang et al. 2023), if a discrete diffusion was trained
            with them; None for equal weights.
        weighting: ``x0``, or for flows ``sigma_sqrt`` or ``cosmap``; None for equal weights.
        noise_offset: scale of noise that is equal for all pixels of a channel.
        input_perturbation: scale of additional noise in the input only.
        loss_type: ``l2``, ``huber`` or ``smooth_l1``.
        huber_c: errors below this value are squared by ``huber`` and ``smooth_l1``.
        huber_schedule: how it depends on the timestep: ``snr``, ``exponential``, ``constant``.
        shift: shift of a flow's timesteps towards noise; None for the scheduler's. It changes the
            timesteps to choose from, not the loss at a timestep.

    Raises:
        DminError: the family does not have this process, or the process does not have this loss.
    """

    processes: ClassVar[tuple[type[Process], ...]] = (DiscreteDiffusion, EDM, RectifiedFlow)
    """The processes that networks of the family are trained with."""
    family: ClassVar[str]  # its name in ``model=``
    claims: ClassVar[Claims]

    def __init_subclass__(cls) -> None:
        """Register a class that claims checkpoints as a family."""
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
                f"model.path: the {type(scheduler).__name__} of this checkpoint belongs to a "
                f"{type(self.process).__name__}, but {type(self).__name__} is trained as "
                f"{' or '.join(kind.__name__ for kind in self.processes)}. Put the scheduler of "
                "its training in the checkpoint's folder scheduler."
            )
        self.timesteps: Sequence[float] = self.process.timesteps

    def log_snr(self, timesteps: Sequence[float]) -> list[float]:
        """Return the log signal-to-noise ratio at each timestep."""
        found: list[float] = self.process.log_snr(timesteps)
        return found

    def describe(self) -> dict[str, Any]:
        """Return what defines the loss: process, weighting, and the scales of adapters."""
        adapters = describe_adapters(self.network)
        return {**super().describe(), **self.process.describe(), "adapters": adapters}

    def _judged(
        self, noised: Noised, t: Tensor, prediction: Tensor, bound: Tensor | None = None
    ) -> Prediction:
        """Return a prediction with its target, weight and loss."""
        loss = self.process.loss(noised, prediction, t)
        return Prediction(prediction, noised.target, noised.weight, bound, loss=loss)


def name_settings(family: type, base: type, method: str) -> None:
    """Give a base's class method a signature with all settings of a family.

    The base's method passes ``**settings`` to the constructor, and each constructor passes unknown
    ones to the next. Without this function no signature would name all settings, but ``help()``
    and the validation of configurations read signatures.

    Args:
        family: the class that receives the method.
        base: the class that defines the method.
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
