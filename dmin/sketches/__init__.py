"""Random linear maps from the gradients of a model to a few thousand numbers."""

from dmin.sketches.auto import Auto
from dmin.sketches.base import Sketch, Sketched
from dmin.sketches.block_cyclic import BlockCyclic
from dmin.sketches.factored import Factored
from dmin.sketches.gaussian import Gaussian
from dmin.sketches.mask_sjlt import MaskSJLT
from dmin.sketches.none import FullGradient
from dmin.sketches.oporp import OPORP
from dmin.sketches.sjlt import SJLT
from dmin.sketches.tensor_sketch import TensorSketch

__all__ = ["OPORP", "SJLT", "Auto", "BlockCyclic", "Factored", "FullGradient", "Gaussian"]
__all__ += ["MaskSJLT", "Sketch", "Sketched", "TensorSketch"]
