"""Benchmarks: how far an attribution can be trusted, measured against ground truth."""

from dmin.evaluation.benchmark import Benchmark, Task
from dmin.evaluation.ensemble import Ensemble, Recipe
from dmin.evaluation.ground_truth import GroundTruth, SameColumn, SameLabel, Source

__all__ = [
    "Benchmark",
    "Ensemble",
    "GroundTruth",
    "Recipe",
    "SameColumn",
    "SameLabel",
    "Source",
    "Task",
]
