"""Every method on every task: features once, scores by method, metrics by ground truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dmin.attribution import Method, Side, score_matrix
from dmin.evaluation.ground_truth import GroundTruth
from dmin.evaluation.metrics import Estimate, bootstrap, measure


@dataclass(frozen=True)
class Task:
    """Queries and what counts as a right answer.

    Args:
        queries: a dataset, or a source of one (``dmin.queries``).
        ground_truth: right answers and metrics.
    """

    queries: Any
    ground_truth: GroundTruth


class Result(NamedTuple):
    """One cell of the table."""

    task: str
    method: str
    metric: str
    queries: int
    estimate: Estimate


class Benchmark:
    """A table of methods × tasks × metrics.

    Args:
        tasks: by name.
        methods: by name, in the order of the table.
    """

    def __init__(self, tasks: Mapping[str, Task], methods: Mapping[str, Method]) -> None:
        self.tasks = dict(tasks)
        self.methods = dict(methods)

    def run(
        self, train: Side, queries: Callable[[str, Task], Side], progress: Callable[[str], None]
    ) -> list[Result]:
        """Score and measure everything.

        Args:
            train: the training side.
            queries: gives the query side of a task, collected with the same settings.
            progress: told what is being done.
        """
        results = []
        for task_name, task in self.tasks.items():
            side = queries(task_name, task)
            relevant = task.ground_truth.relevant(side.store, train.store)
            for method_name, method in self.methods.items():
                progress(f"{task_name}: {method_name}")
                scores = score_matrix(side, train, method)
                for metric in task.ground_truth.metrics:
                    estimate = bootstrap(measure(metric, scores, relevant))
                    results.append(Result(task_name, method_name, metric, len(side), estimate))
        return results
