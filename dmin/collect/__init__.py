"""From examples to a store of sketched gradients, in two phases: encode, then differentiate."""

from dmin.collect.collector import FEATURE_SCHEMA
from dmin.collect.features import Features
from dmin.collect.options import CollectOptions
from dmin.collect.peak_memory import PeakMemory
from dmin.collect.resume import GradientCollector
from dmin.collect.trainer import Trainer, placed_as_collected, predict_trainer

__all__ = [
    "FEATURE_SCHEMA",
    "CollectOptions",
    "Features",
    "GradientCollector",
    "PeakMemory",
    "Trainer",
    "placed_as_collected",
    "predict_trainer",
]
