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
"""Means of all quick metrics of a method on some tasks, by ``task/truth/metric``."""

ALPHAS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
DIMENSIONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
POWERS = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Tuning:
    """Criteria that settings are chosen by, and the path along which they are tried.

    Each criterion gives every method that has such settings a row of its own. Its task is used for
    nothing else: it is left out of all tables but the path's.

    Args:
        by: criterion -> ``task/truth/metric``, larger is better.
        alpha: values of the damping, of methods whose own is given so.
        effective: dimensions, of methods whose damping is given so.
        p: values of the power, of methods that have one.
        watch: other tasks whose metrics the path shows, though nothing is chosen by them.
    """

    by: Mapping[str, str]
    alpha: Sequence[float] = ALPHAS
    effective: Sequence[float] = DIMENSIONS
    p: Sequence[float] = POWERS
    watch: Sequence[str] = ()

    @property
    def tasks(self) -> set[str]:
        """The tasks that settings are chosen on."""
        return {metric.partition("/")[0] for metric in self.by.values()}

    def check(self, tasks: Mapping[str, Mapping[str, GroundTruth]]) -> None:
        """Refuse criteria that name what is not there, or cost models at each point.

        Raises:
            DminError: says which.
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
        """Say whether a method has settings that are chosen: those that its fit does not use."""
        return isinstance(method, DampedCurvatureMethod)

    def walk(
        self, name: str, method: DampedCurvatureMethod, judge: Judge
    ) -> tuple[dict[Row, Method], list[dict[str, Any]]]:
        """Try every point; return the best by each criterion, and the whole path.

        Args:
            name: of the method.
            method: fitted.
            judge: measures it at a point.
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
            # What an effective dimension comes to, so that a path has one measure of damping.
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
