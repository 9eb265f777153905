"""Every method on every task: features once, scores by method, metrics by ground truth."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from dmin.attribution import FeatureSet, Method
from dmin.attribution.check import check_pair
from dmin.evaluation.context import BenchmarkContext
from dmin.evaluation.controls import transformed
from dmin.evaluation.report.results import Cell, Cost, Report, Row, compared
from dmin.evaluation.scoring import Scored, all_scores, fitted
from dmin.evaluation.truths.base import Array, GroundTruth
from dmin.evaluation.tuning import Tuning
from dmin.runtime.errors import DminError
from dmin.store.encoding import STORED_AS


@dataclass(frozen=True)
class Task:
    """Queries, and the ground truths that measure the scores for them.

    Args:
        truths: by name; None removes one that a configuration inherits.
        queries: a dataset, or a source of one (``dmin.queries``); None if all ground truths use
            self-influence of training examples.
    """

    truths: Mapping[str, GroundTruth]
    queries: Any = None

    def __post_init__(self) -> None:
        """Drop the ground truths that are None."""
        kept = {name: truth for name, truth in self.truths.items() if truth is not None}
        object.__setattr__(self, "truths", kept)


@dataclass
class Benchmark:
    """Methods × tasks × ground truths, each with its controls.

    Args:
        tasks: by name.
        methods: names of methods, or ``all``.
        without: names of methods to leave out of ``all``.
        settings: of methods, by name; they replace those of the methods' YAML.
        reference: the method to which paired differences are computed.
        tuning: criteria by which settings of methods are chosen, and the values tried; None: no
            tuning.
        untrained: also measure each method on an untrained network.
        transforms: also measure monotone transforms of each method's scores, where they matter.
        costly_for: tuning criteria whose rows are measured by costly ground truths, which train
            models for each row. A method without tuning is always measured.
        dims: sketch dimensions to fold to; empty: only the size as collected.
        resamples: of the bootstrap.
        prepare: train the model and collect its store before measuring, if they do not exist.
        chunk: models retrained at a time.
        running: tasks for methods that run the model for each query, which takes seconds per
            query; None: all tasks.
        models: number of models for methods that average over several. They have the same recipe
            and other seeds, unless the method's ``checkpoints`` are named.

    Raises:
        DminError: a tuning criterion does not exist.
    """

    tasks: Mapping[str, Task]
    methods: Literal["all"] | Sequence[str] = "all"
    without: Sequence[str] = ()
    settings: Mapping[str, Mapping[str, Any]] | None = None
    reference: str = "dmin"
    tuning: Tuning | None = None
    untrained: bool = False
    transforms: bool = False
    costly_for: Sequence[str] = ()
    dims: Sequence[int] = ()
    resamples: int = 1000
    prepare: bool = False
    chunk: int = 64
    models: int = 1
    running: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse criteria that do not exist."""
        if self.tuning is not None:
            self.tuning.check({name: task.truths for name, task in self.tasks.items()})
        if unknown := set(self.costly_for) - set(self.tuning.by if self.tuning else ()):
            raise DminError(
                f"benchmark.costly_for={list(self.costly_for)}: {unknown.pop()!r} is not a "
                f"criterion of benchmark.tuning.by."
            )

    def run(self, context: BenchmarkContext, methods: Mapping[str, Method]) -> Report:
        """Score and measure everything.

        Args:
            context: model, training examples, how to collect and retrain.
            methods: by name, in the order of the tables.
        """
        start, report = time.perf_counter(), Report([], reference=self.reference)
        cells: list[Cell] = []
        for dim in self.dims or (None,):
            place = context if dim is None else context.at(dim)
            cells += _Run(self, place, report, dim).cells(methods)
        if not any(cell.row.method in methods for cell in cells) and report.left_out:
            name, reason = next(iter(report.left_out.items()))
            raise DminError(f"no method could be measured; the reason for {name}: {reason}")
        report.results = compared(cells, self.reference)
        report.notes |= context.describe()
        report.notes["seconds"] = f"{time.perf_counter() - start:.0f}"
        return report


class _Run:
    """One pass over all methods at one size of the sketch."""

    def __init__(
        self, benchmark: Benchmark, context: BenchmarkContext, report: Report, dim: int | None
    ) -> None:
        self.benchmark, self.context, self.report, self.dim = benchmark, context, report, dim
        self.running = list(benchmark.tasks if benchmark.running is None else benchmark.running)
        # Ground truths store what they prepare, so each task has its own copies.
        self.tasks = {
            name: Task({of: copy.copy(truth) for of, truth in task.truths.items()}, task.queries)
            for name, task in benchmark.tasks.items()
        }
        self.sides: dict[str, FeatureSet] = {
            name: context.query_side(name, task.queries) for name, task in self.tasks.items()
        }
        for name, task in self.tasks.items():
            for truth in task.truths.values():
                truth.prepare(context, self.sides[name])

    def cells(self, methods: Mapping[str, Method]) -> list[Cell]:
        cells, kept = list(self._references()), []
        for number, (name, method) in enumerate(methods.items()):
            self.context.on_progress(f"scoring: {name}", number, len(methods))
            if self.dim not in (None, *self.benchmark.dims[:1]) and not method.requires.readouts:
                continue  # a method without gradients is the same at every size
            try:
                for scored in self._rows(name, method):
                    cells += self._quick(scored)
                    if self._is_costly(scored.row, method):
                        kept.append(scored)
            except DminError as error:
                self.report.left_out[name] = str(error)
        self.context.on_progress("scoring", len(methods), len(methods))
        return cells + list(self._costly(kept))

    def _rows(self, name: str, method: Method) -> Iterator[Scored]:
        """Yield the scores of a method with its settings, with tuned settings, and as controls."""
        able = self._able(method)
        if not able:
            raise DminError(
                "no task has queries with a trajectory: set, for example, queries.trajectory=10 "
                "for a task with generated queries."
                if method.requires.trajectory
                else f"it runs the model, and benchmark.running={self.running} "
                f"is none of the tasks {', '.join(self.sides)}."
            )
        check_pair(next(iter(able.values())), self.context.train, method)
        ready, seconds = fitted(method, self.context.train)
        settings: dict[Row, Method] = {Row(name): ready}
        tuning = self.benchmark.tuning
        if tuning is not None and tuning.tunes(ready) and tuning.tasks <= set(able):
            chosen, path = tuning.walk(name, ready, self._judge)
            self.report.path += path
            settings |= chosen
        at = "" if self.dim is None else f", k = {self.dim:,}"
        for row, point in settings.items():
            for what, note in point.notes().items():
                self.report.fits[f"{row.name}{at}, {what}"] = note
            yield self._scored(row, point, self.context.train, self.sides, seconds)
        needs = method.requires
        # Methods with further stores (checkpoints, trajectories) have none for an untrained model.
        own = needs.checkpoints or needs.trajectory or needs.model
        if self.benchmark.untrained and needs.readouts and not own:
            train = self.context.train_side(blind=True)
            sides = {
                name: self.context.query_side(name, task.queries, blind=True)
                for name, task in self.tasks.items()
            }
            on_untrained, _ = fitted(method, train)
            for row, point in settings.items():
                other = on_untrained if point is ready else tuning.moved(on_untrained, point)  # type: ignore[union-attr]
                yield self._scored(replace(row, control="untrained"), other, train, sides, 0.0)

    def _scored(
        self,
        row: Row,
        method: Method,
        train: FeatureSet,
        sides: Mapping[str, FeatureSet],
        seconds: float,
    ) -> Scored:
        start = time.perf_counter()
        reported = {name for name, _ in self.reported()} & set(self._able(method))
        sides = {name: side for name, side in sides.items() if name in reported}
        truths = {name: self.tasks[name].truths for name in sides}
        scores = all_scores(sides, train, method, truths)
        asked = sum(len(side) for side in sides.values())
        layout = train.store.layout
        size = int(np.prod(layout.row_shape)) * STORED_AS[layout.dtype].itemsize
        needs, each = method.requires, (time.perf_counter() - start) / asked
        reads = "gradients" if needs.readouts else "model" if needs.model else ""
        cost = Cost(size * len(needs.readouts), seconds, each, reads)
        return Scored(row, scores, cost)

    def _able(self, method: Method) -> dict[str, FeatureSet]:
        """Return the queries of the tasks that a method can score, by task."""
        return {
            name: side
            for name, side in self.sides.items()
            if (side.trajectory or not method.requires.trajectory)
            and (name in self.running or not method.requires.model)
        }

    def _judge(self, method: Method, tasks: Sequence[str]) -> dict[str, float]:
        """Return the mean of every metric that is not costly, by ``task/truth/metric``."""
        truths = {
            name: {of: t for of, t in self.tasks[name].truths.items() if not t.costly}
            for name in tasks
        }
        sides = {name: self.sides[name] for name in tasks}
        found = {}
        for (name, of), scores in all_scores(sides, self.context.train, method, truths).items():
            for metric, values in truths[name][of].measure(scores).items():
                found[f"{name}/{of}/{metric}"] = float(values.mean())
        return found

    def _quick(self, scored: Scored) -> Iterator[Cell]:
        for name, task in self.reported():
            for of, truth in task.truths.items():
                if truth.costly or (name, of) not in scored.scores:
                    continue
                scores = scored.scores[name, of]
                yield from self._cells(name, of, truth, scored.row, scores, scored.cost)
                if self.benchmark.transforms and not truth.ranks_only and not scored.row.control:
                    for control, changed in transformed(scores).items():
                        row = replace(scored.row, control=control)
                        yield from self._cells(name, of, truth, row, changed, scored.cost)

    def _costly(self, kept: Sequence[Scored]) -> Iterator[Cell]:
        for name, task in self.reported():
            for of, truth in task.truths.items():
                if truth.costly:
                    able = [s for s in kept if (name, of) in s.scores]
                    truth.expect({s.row.name: s.scores[name, of] for s in able})
                    for s in able:
                        scores = s.scores[name, of]
                        yield from self._cells(name, of, truth, s.row, scores, s.cost)

    def _cells(
        self, task: str, of: str, truth: GroundTruth, row: Row, scores: Array, cost: Cost
    ) -> Iterator[Cell]:
        measured = truth.measure(scores)
        resampled = truth.resampled(scores, measured, self.benchmark.resamples)
        for metric, values in measured.items():
            drawn = resampled[metric]
            yield Cell(task, of, metric, row, values, drawn, cost, self.dim, truth.clusters)

    def _references(self) -> Iterator[Cell]:
        for name, task in self.reported():
            for of, truth in task.truths.items():
                for label, measured in truth.references().items():
                    for metric, values in measured.items():
                        means = GroundTruth.resampled(
                            truth, values, {metric: values}, self.benchmark.resamples
                        )
                        row = Row(label, control="reference")
                        yield Cell(name, of, metric, row, values, means[metric], dim=self.dim)

    def reported(self) -> Iterator[tuple[str, Task]]:
        """Yield the tasks that are not used for tuning."""
        chosen_on = self.benchmark.tuning.tasks if self.benchmark.tuning else set()
        for name, task in self.tasks.items():
            if name not in chosen_on:
                yield name, task

    def _is_costly(self, row: Row, method: Method) -> bool:
        tuning = self.benchmark.tuning
        if row.control:
            return row == Row(self.benchmark.reference, control="untrained")
        if tuning is None or not tuning.tunes(method):
            return True
        return row.tuned in self.benchmark.costly_for
