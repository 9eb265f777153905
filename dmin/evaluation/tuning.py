"""Tune damping and power on queries that are in no reported number."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from dmin.attribution import Method
from dmin.attribution.curvature.damped import DampedCurvatureMethod
from dmin.evaluation.report.results import Row
from dmin.evaluation.truths.base import GroundTruth
from dmin.runtime.errors import DminError

AnyMethod = TypeVar("AnyMethod", bound=Method)
Judge = Callable[[Method, Sequence[str]], dict[str, float]]
"""Returns the means of a method's metrics that are not costly, by ``task/truth/metric``."""

ALPHAS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
DIMENSIONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
POWERS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Tuning:
    """Criteria by which settings are chosen, and the values that are tried.

    Each criterion adds a row for every method with such settings. The criterion's task is used for
    nothing else: only the table of tried values (the path) shows it.

    Args:
        by: criterion -> ``task/truth/metric``, larger is better.
        alpha: values of the damping, for methods with damping given by α.
        effective: effective dimensions, for methods with damping given by them.
        p: values of the power, for methods that have one.
        watch: other tasks whose metrics the path shows; nothing is chosen by them.
    """

    by: Mapping[str, str]
    alpha: Sequence[float] = ALPHAS
    effective: Sequence[float] = DIMENSIONS
    p: Sequence[float] = POWERS
    watch: Sequence[str] = ()

    @property
    def tasks(self) -> set[str]:
        """The tasks on which settings are chosen."""
        return {metric.partition("/")[0] for metric in self.by.values()}

    def check(self, tasks: Mapping[str, Mapping[str, GroundTruth]]) -> None:
        """Refuse criteria that do not exist, or would train models for each tried value.

        Raises:
            DminError: names the criterion.
        """
        for name, metric in self.by.items():
            task, _, rest = metric.partition("/")
            truth = tasks.get(task, {}).get(rest.partition("/")[0])
            if truth is None or truth.costly or not rest.partition("/")[2]:
                raise DminError(
                    f"benchmark.tuning.by.{name}={metric!r}: write task/truth/metric, of a ground "
                    f"truth that does not retrain models for each method."
                )
            if getattr(truth, "half", "A") != "A":
                raise DminError(
                    f"benchmark.tuning.by.{name}={metric!r}: it uses the same retrained models as "
                    f"the reported results. Set half: A in this ground truth, for its own subsets "
                    f"and seeds."
                )
        if unknown := [name for name in self.watch if name not in tasks]:
            raise DminError(f"benchmark.tuning.watch: there is no task {unknown[0]!r}.")

    def tunes(self, method: Method) -> TypeGuard[DampedCurvatureMethod]:
        """Return whether a method has settings to tune: damping and power, not used by its fit."""
        return isinstance(method, DampedCurvatureMethod)

    def walk(
        self, name: str, method: DampedCurvatureMethod, judge: Judge
    ) -> tuple[dict[Row, Method], list[dict[str, Any]]]:
        """Try every combination; return the best by each criterion, and the metrics of all.

        Args:
            name: of the method.
            method: fitted.
            judge: measures a method.
        """
        by_dimension = method.effective is not None
        damping = {"effective": self.effective} if by_dimension else {"alpha": self.alpha}
        settings = {**damping, **({"p": self.p} if hasattr(method, "p") else {})}
        method = _at(method, {"known": {}})  # queries are projected once
        best: dict[str, tuple[float, Method, str]] = {}
        path = []
        for values in itertools.product(*settings.values()):
            point = dict(zip(settings, values, strict=True))
            words = ", ".join(f"{k} = {v:g}" for k, v in point.items())
            there = _at(method, point)
            found = judge(there, [*self.tasks, *self.watch])
            # The mean α of an effective dimension, so that all methods have one measure of damping.
            path.append({"method": name, "alpha": there.mean_alpha, **point, **found})
            for criterion, metric in self.by.items():
                if criterion not in best or found[metric] > best[criterion][0]:
                    best[criterion] = found[metric], there, words
        rows = {
            Row(name, c, "", words): _at(there, {"known": None})
            for c, (_, there, words) in best.items()
        }
        return rows, path

    def moved(self, method: Method, point: Method) -> Method:
        """Return a fitted method with the settings of another."""
        chosen = ("alpha", "effective", "p")
        return _at(method, {k: getattr(point, k) for k in chosen if hasattr(point, k)})


def _at(method: AnyMethod, settings: Mapping[str, Any]) -> AnyMethod:
    """Return a method with other settings and the same fit."""
    other = copy.copy(method)
    for name, value in settings.items():
        setattr(other, name, value)
    return other
