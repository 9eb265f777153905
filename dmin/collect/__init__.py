"""From examples to a store of sketched gradients, in two phases: encode, then differentiate."""

from dmin.collect.collector import FEATURE_SCHEMA, GradientCollector
from dmin.collect.features import Features
from dmin.collect.microbatch import PeakMemory
from dmin.collect.session import SketchWriter, predict_trainer

__all__ = [
    "FEATURE_SCHEMA",
    "Features",
    "GradientCollector",
    "PeakMemory",
    "SketchWriter",
    "predict_trainer",
]
