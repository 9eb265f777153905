"""Random linear maps from the gradients of a model to a few thousand numbers."""

from dmin.sketches.base import Parameter, Parameters, Sketch, Sketched
from dmin.sketches.block_cyclic import BlockCyclic
from dmin.sketches.oporp import OPORP
from dmin.sketches.tensor_sketch import TensorSketch

__all__ = ["OPORP", "BlockCyclic", "Parameter", "Parameters", "Sketch", "Sketched", "TensorSketch"]
