"""Benchmarks: how far an attribution can be trusted, measured against ground truth."""

from dmin.evaluation.benchmark import Benchmark, Task
from dmin.evaluation.ground_truth import GroundTruth, SameLabel, Source

__all__ = ["Benchmark", "GroundTruth", "SameLabel", "Source", "Task"]
