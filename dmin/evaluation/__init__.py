"""Benchmarks: how far an attribution can be trusted, measured against ground truth.

Features (a store) → scores (a method) → metrics (a ground truth): each is made without the others.
"""

from dmin.evaluation.benchmark import Benchmark, Task
from dmin.evaluation.counterfactual import LDS, Diversity, LeaveOut, Removal, UnionRemoval
from dmin.evaluation.ensemble import Ensemble
from dmin.evaluation.ground_truth import (
    GroundTruth,
    Relevance,
    SameColumn,
    SameLabel,
    SelfInfluence,
    Source,
)
from dmin.evaluation.recipe import Recipe
from dmin.evaluation.results import Report, Result
from dmin.evaluation.tuning import Tuning
from dmin.evaluation.world import World

__all__ = [
    "LDS",
    "Benchmark",
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
    "World",
]
