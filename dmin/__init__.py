"""Which training examples made this diffusion model produce this image?

>>> collector = GradientCollector(model)
>>> store = collector.collect(images, "outputs/train")
>>> ranking = retrieve(collector.collect(queries, "outputs/queries"), store, k=10)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see of the names below
    from dmin.attribution import (
        DMin as DMin,
        FeatureSet as FeatureSet,
        Ranking as Ranking,
        places as places,
        retrieve as retrieve,
    )
    from dmin.collect import GradientCollector as GradientCollector
    from dmin.data import Example as Example, Examples as Examples
    from dmin.diffusion import (
        Explicit as Explicit,
        SharedNoise as SharedNoise,
        Stratified as Stratified,
    )
    from dmin.gradients.capture import Capture as Capture
    from dmin.models import (
        DiffusionModel as DiffusionModel,
        Prediction as Prediction,
        from_pipeline as from_pipeline,
    )
    from dmin.runtime.errors import DminError as DminError
    from dmin.sketches import OPORP as OPORP, Auto as Auto, BlockCyclic as BlockCyclic
    from dmin.store import Store as Store

__version__ = "0.2.0"

# Public names by where they live. They are imported when first used: `import dmin` is instant,
# and reading a store needs neither torch nor Lightning.
_HOMES = {
    "dmin.attribution": ("DMin", "FeatureSet", "Ranking", "places", "retrieve"),
    "dmin.collect": ("GradientCollector",),
    "dmin.data": ("Example", "Examples"),
    "dmin.diffusion": ("Explicit", "SharedNoise", "Stratified"),
    "dmin.gradients.capture": ("Capture",),
    "dmin.models": ("DiffusionModel", "Prediction", "from_pipeline"),
    "dmin.runtime.errors": ("DminError",),
    "dmin.sketches": ("Auto", "BlockCyclic", "OPORP"),
    "dmin.store": ("Store",),
}
_PUBLIC = {name: home for home, names in _HOMES.items() for name in names}

# What 0.1.0 called it.
_RENAMED = {"Side": "FeatureSet"}

__all__ = sorted(_PUBLIC)


if not TYPE_CHECKING:  # with it, checkers would take any name for a public one

    def __getattr__(name: str) -> Any:
        name = _RENAMED.get(name, name)
        if name not in _PUBLIC:
            raise AttributeError(f"module 'dmin' has no attribute {name!r}")
        return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
