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
    )
    from dmin.attribution import (
        FeatureSet as FeatureSet,
    )
    from dmin.attribution import (
        Ranking as Ranking,
    )
    from dmin.attribution import (
        places as places,
    )
    from dmin.attribution import (
        retrieve as retrieve,
    )
    from dmin.collect import GradientCollector as GradientCollector
    from dmin.data import Example as Example
    from dmin.data import Examples as Examples
    from dmin.diffusion import (
        Explicit as Explicit,
    )
    from dmin.diffusion import (
        SharedNoise as SharedNoise,
    )
    from dmin.diffusion import (
        Stratified as Stratified,
    )
    from dmin.gradients.capture import Capture as Capture
    from dmin.models import (
        DiffusionModel as DiffusionModel,
    )
    from dmin.models import (
        Prediction as Prediction,
    )
    from dmin.models import (
        from_pipeline as from_pipeline,
    )
    from dmin.runtime.errors import DminError as DminError
    from dmin.sketches import OPORP as OPORP
    from dmin.sketches import Auto as Auto
    from dmin.sketches import BlockCyclic as BlockCyclic
    from dmin.store import Store as Store

__version__ = "0.1.0"

# Public names and where they live. They are imported when first used: `import dmin` is instant,
# and reading a store needs neither torch nor Lightning.
_PUBLIC = {
    "Auto": "dmin.sketches",
    "BlockCyclic": "dmin.sketches",
    "Capture": "dmin.gradients.capture",
    "DMin": "dmin.attribution",
    "DiffusionModel": "dmin.models",
    "DminError": "dmin.runtime.errors",
    "Example": "dmin.data",
    "Examples": "dmin.data",
    "Explicit": "dmin.diffusion",
    "FeatureSet": "dmin.attribution",
    "GradientCollector": "dmin.collect",
    "OPORP": "dmin.sketches",
    "Prediction": "dmin.models",
    "Ranking": "dmin.attribution",
    "SharedNoise": "dmin.diffusion",
    "Store": "dmin.store",
    "Stratified": "dmin.diffusion",
    "from_pipeline": "dmin.models",
    "places": "dmin.attribution",
    "retrieve": "dmin.attribution",
}

# What 0.1.0 called it.
_RENAMED = {"Side": "FeatureSet"}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    name = _RENAMED.get(name, name)
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dmin' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
