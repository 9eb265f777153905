"""Scores by methods that are fitted once and used many times."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dmin.attribution import ExampleBlock, FeatureSet, Method, Requires
from dmin.attribution.scores import fitted_scores
from dmin.attribution.self_influence import fitted_self_influence
from dmin.evaluation.report.results import Cost, Row
from dmin.evaluation.truths.base import Array, GroundTruth
from dmin.runtime.errors import DminError


@dataclass(frozen=True)
class Scored:
    """A row of the report with its scores by (task, ground truth)."""

    row: Row
    scores: Mapping[tuple[str, str], Array]
    cost: Cost


def fitted(method: Method, train: FeatureSet) -> tuple[Method, float]:
    """Return a fitted copy of a method, and the seconds that fitting takes.

    The time includes fits that were cached by another method.
    """
    before, method = dict(train.fits.kept), copy.copy(method)
    train.fits.used.clear()
    start = time.perf_counter()
    method.fit(train)
    seconds = time.perf_counter() - start
    return method, seconds + sum(before[key][1] for key in set(train.fits.used) if key in before)


def all_scores(
    sides: Mapping[str, FeatureSet],
    train: FeatureSet,
    method: Method,
    truths: Mapping[str, Mapping[str, GroundTruth]],
) -> dict[tuple[str, str], Array]:
    """Return the scores that ground truths need, all queries scored in one pass.

    Args:
        sides: queries of each task.
        train: the training examples.
        method: fitted to them.
        truths: ground truths of each task, by name.
    """
    asked = [name for name in sides if any(truth.of == "pairs" for truth in truths[name].values())]
    pairs: dict[str, Array] = {}
    if asked:
        scores = fitted_scores(Joined([sides[name] for name in asked]), train, method)
        ends = np.cumsum([len(sides[name]) for name in asked])[:-1]
        pairs = dict(zip(asked, np.split(scores, ends), strict=True))
    return {
        (name, of): (
            pairs[name] if truth.of == "pairs" else fitted_self_influence(train, method, truth.rows)
        )
        for name in sides
        for of, truth in truths[name].items()
    }


class Joined(FeatureSet):
    """Several feature sets as one, so that all queries are scored in one pass over the store."""

    def __init__(self, parts: Sequence[FeatureSet]) -> None:
        super().__init__(parts[0].store)  # all parts have its layout
        self.parts: list[FeatureSet] = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        """Return the number of examples in all parts."""
        return int(self._starts[-1])

    def block(self, rows: Sequence[int] | np.ndarray, requires: Requires) -> ExampleBlock:
        """Return chosen rows, in ascending order, with the data that a method requires.

        Raises:
            DminError: the images have different sizes.
        """
        rows = np.asarray(rows)
        return _joined([part.block(chosen, requires) for part, chosen in self._chosen(rows)])

    def _chosen(self, rows: np.ndarray) -> Iterator[tuple[FeatureSet, np.ndarray]]:
        for part, start, end in zip(self.parts, self._starts[:-1], self._starts[1:], strict=True):
            here = rows[(rows >= start) & (rows < end)] - start
            if len(here):
                yield part, here


def _joined(blocks: Sequence[ExampleBlock]) -> ExampleBlock:
    """Return blocks of several feature sets as one."""
    shapes = {tuple(b.images.shape[1:]) for b in blocks if b.images is not None}
    if len(shapes) > 1:
        raise DminError(
            f"images of {' and '.join(map(str, sorted(shapes)))} among the queries: a method that "
            f"compares images needs one size. Scale them to the size of the training images."
        )
    images = [b.images for b in blocks if b.images is not None]
    first = blocks[0]
    return ExampleBlock(
        first=first.first,
        ids=[id for b in blocks for id in b.ids],
        features={name: torch.cat([b.features[name] for b in blocks]) for name in first.features},
        norms={name: torch.cat([b.norms[name] for b in blocks]) for name in first.norms},
        images=torch.cat(images) if images else None,
        examples=[example for b in blocks for example in b.examples],
        checkpoints=[_joined(same) for same in zip(*(b.checkpoints for b in blocks), strict=True)],
        trajectory=[_joined(same) for same in zip(*(b.trajectory for b in blocks), strict=True)],
    )
