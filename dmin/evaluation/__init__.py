"""Benchmarks: how far an attribution can be trusted, measured against ground truth.

Features (a store) → scores (a method) → metrics (a ground truth): each can be computed without the
others.
"""

from dmin.evaluation.benchmark import Benchmark, Task
from dmin.evaluation.context import BenchmarkContext
from dmin.evaluation.report.results import Report, Result
from dmin.evaluation.retraining.ensemble import Ensemble
from dmin.evaluation.retraining.recipe import Recipe
from dmin.evaluation.truths.base import GroundTruth
from dmin.evaluation.truths.diversity import Diversity
from dmin.evaluation.truths.lds import LDS
from dmin.evaluation.truths.leave_out import LeaveOut
from dmin.evaluation.truths.relevance import Relevance, SameColumn, SameLabel, Source
from dmin.evaluation.truths.removal import Removal, UnionRemoval
from dmin.evaluation.truths.self_influence import SelfInfluence
from dmin.evaluation.tuning import Tuning

__all__ = ["Benchmark", "BenchmarkContext", "Ensemble", "Recipe", "Report", "Result", "Task"]
__all__ += ["LDS", "Diversity", "GroundTruth", "LeaveOut", "Relevance", "Removal", "UnionRemoval"]
__all__ += ["SameColumn", "SameLabel", "SelfInfluence", "Source", "Tuning"]
