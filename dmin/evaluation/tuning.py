"""Choosing damping, power and timestep weights on queries that are in no reported number."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmin.attribution import DMin, Method
from dmin.attribution.curvature.damped import DampedCurvatureMethod
from dmin.attribution.methods.spectral import SpectralFamily
from dmin.evaluation.report.results import Row
from dmin.evaluation.truths.base import GroundTruth
from dmin.runtime.errors import DminError

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
        widths: of bumps of timestep weights (:func:`bump`), tried around every timestep at the
            damping and power chosen so far, of methods that have weights; none leaves them even.
    """

    by: Mapping[str, str]
    alpha: Sequence[float] = ALPHAS
    effective: Sequence[float] = DIMENSIONS
    p: Sequence[float] = POWERS
    watch: Sequence[str] = ()
    widths: Sequence[float] = ()

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
                    f"truth that trains no model for each row."
                )
        if any(not 0 < width < math.inf for width in self.widths):
            raise DminError(
                f"benchmark.tuning.widths={list(self.widths)}: give positive widths, in shares of "
                f"the way from the noisiest timestep to the cleanest, such as [0.1, 0.3]."
            )
        if unknown := [name for name in self.watch if name not in tasks]:
            raise DminError(f"benchmark.tuning.watch: there is no task {unknown[0]!r}.")

    def tunes(self, method: Method) -> bool:
        """Say whether a method has settings that are chosen: those that its fit does not use."""
        return isinstance(method, DampedCurvatureMethod) or bool(self.widths and _weighs(method))

    def walk(
        self, name: str, method: Method, judge: Judge, steps: int
    ) -> tuple[dict[Row, Method], list[dict[str, Any]]]:
        """Try every point; return the best by each criterion, and the whole path.

        Args:
            name: of the method.
            method: fitted.
            judge: measures it at a point.
            steps: how many timesteps there are.
        """
        settings: dict[str, Sequence[float]] = {}
        if isinstance(method, DampedCurvatureMethod):
            by_dimension = method.effective is not None
            settings = {"effective": self.effective} if by_dimension else {"alpha": self.alpha}
        if hasattr(method, "p"):
            settings["p"] = self.p
        method = _at(method, {"known": {}})  # queries are projected once
        best: dict[str, tuple[float, Method, str]] = {}
        path = []

        def tried(there: Method, criteria: Iterable[str], words: str, **point: float) -> None:
            found = judge(there, [*self.tasks, *self.watch])
            # What an effective dimension comes to, so that a path has one measure of damping.
            alpha = {"alpha": there.mean_alpha} if isinstance(there, DampedCurvatureMethod) else {}
            path.append({"method": name, **alpha, **point, **found})
            for criterion in criteria:
                value = found[self.by[criterion]]
                if criterion not in best or value > best[criterion][0]:
                    best[criterion] = value, there, words

        for values in itertools.product(*settings.values()):
            point = dict(zip(settings, values, strict=True))
            words = ", ".join(f"{k} = {v:g}" for k, v in point.items())
            tried(_at(method, point), self.by, words, **point)
        if _weighs(method):
            for criterion, (_, start, before) in list(best.items()):
                for width, number in itertools.product(self.widths, range(steps)):
                    centre = number / max(1, steps - 1)
                    weights = bump(steps, centre, width)
                    listed = ", ".join(f"{w:.2f}" for w in weights)
                    words = f"{before}, weights = [{listed}]".removeprefix(", ")
                    there = {k: getattr(start, k) for k in settings}
                    moved = _at(start, {"weights": weights})
                    tried(moved, [criterion], words, **there, centre=centre, width=width)
        rows = {
            Row(name, c, "", words): _at(there, {"known": None})
            for c, (_, there, words) in best.items()
        }
        return rows, path

    def moved(self, method: Method, point: Method) -> Method:
        """Return a fitted method with the settings of another."""
        chosen = ("alpha", "effective", "p", *(["weights"] if _weighs(method) else []))
        return _at(method, {k: getattr(point, k) for k in chosen if hasattr(point, k)})


def bump(steps: int, centre: float, width: float) -> Tensor:
    """Return timestep weights ``w_t ∝ exp(−(x_t − centre)² / (2 width²))``, of mean 1.

    Args:
        steps: T.
        centre: from 0, the noisiest timestep, to 1, the cleanest, as x_t is.
        width: in the same unit.

    Returns:
        float32 ``[T]``.
    """
    places = torch.linspace(0, 1, steps)
    weights = torch.exp(-((places - centre) ** 2) / (2 * width**2))
    return weights / weights.mean()


def _weighs(method: Method) -> bool:
    """Say whether a method's scores are a sum over timesteps with weights."""
    # Lengths of gradients weigh the timesteps of `dmin_unnormalised` already.
    return isinstance(method, SpectralFamily) or (type(method) is DMin and method.scale != "norm")


def _at(method: Method, settings: Mapping[str, Any]) -> Method:
    """Return a method with other settings and the same fit."""
    other = copy.copy(method)
    for name, value in settings.items():
        setattr(other, name, value)
    return other
