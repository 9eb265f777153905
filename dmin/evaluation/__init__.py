"""Benchmarks: how far an attribution can be trusted, measured against ground truth.

Features (a store) → scores (a method) → metrics (a ground truth): each is made without the others.
"""

from dmin.evaluation.benchmark import Benchmark, Task
from dmin.evaluation.context import BenchmarkContext
from dmin.evaluation.report.results import Report, Result
from dmin.evaluation.retraining.ensemble import Ensemble
from dmin.evaluation.retraining.recipe import Recipe
from dmin.evaluation.truths.base import (
    GroundTruth,
    Relevance,
    SameColumn,
    SameLabel,
    SelfInfluence,
    Source,
)
from dmin.evaluation.truths.counterfactual import LDS, Diversity, LeaveOut, Removal, UnionRemoval
from dmin.evaluation.tuning import Tuning

__all__ = [
    "LDS",
    "Benchmark",
    "BenchmarkContext",
    "Diversity",
    "Ensemble",
    "GroundTruth",
    "LeaveOut",
    "Recipe",
    "Relevance",
    "Removal",
    "Report",
    "Result",
    "SameColumn",
    "SameLabel",
    "SelfInfluence",
    "Source",
    "Task",
    "Tuning",
    "UnionRemoval",
]
