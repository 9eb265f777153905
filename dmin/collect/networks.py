"""Which parameters a timestep uses, for models with several networks for different timesteps."""

from typing import Any

import torch
from torch import Tensor

from dmin.diffusion.inputs import NoisedExamples
from dmin.gradients.parameters import Parameters
from dmin.runtime.errors import DminError


class Networks:
    """The timesteps of a collection, grouped by the network that they use (usually one).

    Args:
        model: the diffusion model.
        attributed: the attributed parameters.
        timesteps: of the collection.

    Raises:
        DminError: no timestep uses an attributed parameter.
    """

    def __init__(self, model: Any, attributed: Parameters, timesteps: tuple[float, ...]) -> None:
        self._unused_at = getattr(model, "unused_at", lambda t: ())
        self._names = list(attributed.by_name)
        self._kinds: list[tuple[str, ...]] = [self.unused_at(t) for t in timesteps]
        self.several: bool = len(set(self._kinds)) > 1
        if not any(map(self.reaches, timesteps)):
            raise DminError(
                f"collect.params: no timestep of {list(timesteps)} uses these parameters, whose "
                f"network ({self._names[0]}) serves other timesteps. Set timesteps=explicit with "
                f"timesteps of this network, or attribute the other network."
            )
        self._apart = not all(map(self.reaches, timesteps))

    def unused_at(self, t: float) -> tuple[str, ...]:
        """Return the name prefixes of parameters that a timestep does not use."""
        found: tuple[str, ...] = self._unused_at(t)
        return found

    def reaches(self, t: float) -> bool:
        """Return whether a timestep uses an attributed parameter; otherwise its rows are zero."""
        unused = self.unused_at(t)
        return not unused or not all(name.startswith(unused) for name in self._names)

    def reached(self, t: Tensor) -> bool:
        """Return whether any timestep ``[pairs]`` of a pass does."""
        return not self._apart or any(map(self.reaches, t.tolist()))

    def together(self, inputs: NoisedExamples) -> list[Tensor]:
        """Return the indices of the pairs that may share a pass: those of one network."""
        pairs, kinds = torch.arange(len(inputs)), list(dict.fromkeys(self._kinds))
        if len(kinds) == 1:
            return [pairs]
        of = torch.tensor([kinds.index(kind) for kind in self._kinds])[pairs % len(self._kinds)]
        return [pairs[of == kind] for kind in range(len(kinds))]

    def largest(self, inputs: NoisedExamples) -> Tensor:
        """Return the largest group of :meth:`together` that has gradients."""
        groups = self.together(inputs)
        return max(groups, key=lambda pairs: (self.reached(inputs.at(pairs[:1]).t), len(pairs)))
