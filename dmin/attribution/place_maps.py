"""Maps of the positions in a training image and in the query that a score comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dmin.attribution.check import check_pair
from dmin.attribution.curvature.functional_loss import FunctionalLoss, Weights
from dmin.attribution.features import FeatureSet, Requires
from dmin.attribution.inner_product import InnerProduct
from dmin.attribution.method import Method
from dmin.attribution.methods.dmin import DMin
from dmin.attribution.ranking import Ranking, format_score
from dmin.diffusion.inputs import NoisedBatch
from dmin.models.base import READOUTS
from dmin.models.places import by_place
from dmin.runtime.errors import DminError
from dmin.sketches import Sketch

PARALLEL = 1e-4  # of a row's length: two closer than this are one, but for rounding


@dataclass(frozen=True, eq=False)
class Places:
    """The contributions of positions in two pictures to the score of one for the other.

    Args:
        train: float32 ``[h, w]``, of the training picture, at the positions of x0.
        query: the same for the query; None if the method's score is not symmetric.
        score: the score that was split.
    """

    train: np.ndarray
    query: np.ndarray | None
    score: float

    @property
    def rest(self) -> float:
        """The part of the score without a position: the sketch's error, and other loss terms."""
        return self.score - float(self.train.sum(dtype=np.float64))

    def spell(self) -> str:
        """State the sum of the training picture's map, next to the score."""
        return f"sum {format_score(self.score - self.rest)}"


PlacesOf = dict[tuple[str, str, str], Places]
"""By method, query and training example."""


def places(
    queries: FeatureSet,
    train: FeatureSet,
    ranking: Ranking,
    method: Method | None = None,
    shown: int = 3,
) -> PlacesOf:
    """Split the scores of the first examples over the positions of the pictures.

    The loss is a sum over positions p, ``L = Σ_p L_p``; hence so are its gradient and the score:

        ``I(q, i) = Σ_p Σ_{d,t} c_{d,t} ⟨G_{d,t}(q), ∇_θ L_p(θ; x_i, ε_d, t)⟩``

    G is the query's gradient, up to a factor, if the method does not transform it
    (``dmin``), else the adjoint of the sketch applied to the prepared query, ``Sᵀq``. Each term is
    the derivative of L_p along G in forward mode, so that no layer needs spatial positions. The map
    of the query is that of its own loss along the example's gradient. Each example takes about six
    passes of the model at each timestep.

    Args:
        queries: with their dataset.
        train: with dataset and ``origin``, the collector that made it.
        ranking: of these.
        method: of the ranking; :class:`DMin` if none.
        shown: examples of each query, best first.

    Returns:
        The maps by (method, query id, training id).

    Raises:
        DminError: the method's scores are not inner products with stored rows, groups were ranked,
            the
            model is not given, or its loss is not a sum over positions.
    """
    method = method or DMin()
    check_places(method, ranking.group_by)
    check_pair(queries, train, method)
    split = _Split(queries, train, method)
    found: PlacesOf = {}
    for place, query in enumerate(ranking.query_ids):
        ids = ranking.train_ids[place][: min(shown, ranking.count(place))]
        scores = ranking.scores[place]
        for id, score, maps in zip(ids, scores, split.of(query, ids), strict=False):
            found[ranking.method, query, id] = Places(*maps, float(score))
    return found


def save_places(found: PlacesOf, path: str | Path) -> None:
    """Write maps as a NumPy archive: ``train/METHOD/QUERY/ID``, and ``query/…`` if available."""
    parts = {f"train/{'/'.join(key)}": maps.train for key, maps in found.items()}
    parts |= {f"query/{'/'.join(key)}": m.query for key, m in found.items() if m.query is not None}
    np.savez_compressed(path, **cast(Any, parts))


def check_places(method: Method, group_by: str | None = None) -> None:
    """Refuse methods without maps, as far as known before fitting."""
    odd = "groups of examples are ranked" if group_by else None
    if method.requires.checkpoints or method.requires.images or not method.requires.readouts:
        odd = f"method={method.name} does not compare gradients of one model"
    if odd:
        raise DminError(f"retrieve.places splits the score of an example, but {odd}. {_REMEDY}")


_REMEDY = "Choose method=dmin, or another whose scores are inner products; or retrieve.places=0."


class _Split:
    """Splits scores of one method, fitted once."""

    def __init__(self, queries: FeatureSet, train: FeatureSet, method: Method) -> None:
        origin: Any = train.origin
        if origin is None:
            raise DminError(
                "places run the model itself, but only a store was given. Also give the dataset "
                "and the collector that made it: FeatureSet(store, dataset, origin=collector)."
            )
        method.fit(train)
        self.queries, self.train, self.method = queries, train, method
        self.asking = FunctionalLoss(origin.with_model(origin.model.for_queries()))
        self.known = FunctionalLoss(origin, known=train)
        self.sketch: Sketch = origin.sketch

    def of(self, query: str, ids: list[str]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Return the map of each example, and that of the query for it."""
        asked = self._prepared(query)
        rows = asked.queries[0].flatten(0, 1)  # [D · T, G, k]
        own, length = self._row(self.queries, query, asked.readout)
        factors = _factors(rows, own)
        here = self.asking.pairs([self.queries.example(query)])
        examples = [self.train.example(id) for id in ids]
        if any(example.drawn for example in examples):
            raise DminError(
                f"retrieve.places: {ids[0]!r} and others have several draws (run.draws), mirrored "
                f"or cropped differently, so there is no single map. Set retrieve.places=null."
            )
        there = [self.known.pairs([example]) for example in examples]
        scales = [self._scale(asked, id) for id in ids]
        like = next(iter(self.known.weights.values()))
        maps: list[list[Any]] = [[0.0, None if factors is None else 0.0] for _ in ids]
        for point in range(len(rows)):
            if not rows[point].any():  # a timestep of weight nought
                continue
            at = here.rows(slice(point, point + 1))
            if factors is None:
                towards = self.sketch.adjoint(rows[point].to(like))
            else:
                factor = float(factors[point] / length[point])
                towards = _times(_gradient(self.asking, asked.readout, at), factor)
            for found, pairs, scale in zip(maps, there, scales, strict=True):
                its = pairs.rows(slice(point, point + 1))
                of = asked.readout, float(scale[point])
                found[0] = found[0] + _change(self.known, its, towards, *of)
                if factors is not None:
                    back = _times(_gradient(self.known, asked.readout, its), factor)
                    found[1] = found[1] + _change(self.asking, at, back, *of)
        return [(a.numpy(), None if b is None else b.numpy()) for a, b in maps]

    def _prepared(self, query: str) -> InnerProduct:
        row = [self.queries.store.index(query)]
        asked = self.method.transform_query(self.queries.block(row, self.method.requires))
        if not isinstance(asked, InnerProduct):
            raise DminError(
                f"retrieve.places splits inner products with stored rows over positions, but "
                f"method={self.method.name} computes another kind of score. {_REMEDY}"
            )
        return asked

    def _row(self, side: FeatureSet, id: str, readout: str) -> tuple[Tensor, Tensor]:
        """Return an example's row ``[D · T, G, k]``, and the lengths of its gradients."""
        block = side.block([side.store.index(id)], Requires((readout,)))
        lengths = block.norms[readout][0].square().sum(-1).sqrt()
        tiny = torch.finfo(torch.float32).tiny  # a gradient of nought has a row of noughts
        return block.features[readout][0].flatten(0, 1), lengths.flatten().clamp(min=tiny)

    def _scale(self, asked: InnerProduct, id: str) -> Tensor:
        """Return the factors of an example's gradient, ``[D · T]``."""
        row, length = self._row(self.train, id, asked.readout)
        if asked.scale == "norm":
            return torch.ones(len(length))
        # Unit rows have their own length but for the sketch's error, which is left over.
        return 1 / length * row.flatten(1).any(1)


def _factors(rows: Tensor, own: Tensor) -> Tensor | None:
    """Return c with ``rows = c · own`` at each point, ``[points]``; None if there is none."""
    rows, own = rows.flatten(1).double(), own.flatten(1).double()
    c = (rows * own).sum(1) / own.square().sum(1).clamp(min=1e-30)
    apart = (rows - c[:, None] * own).norm(dim=1) > PARALLEL * rows.norm(dim=1)
    return None if bool(apart.any()) else c


def _gradient(loss: FunctionalLoss, readout: str, pair: NoisedBatch) -> Weights:
    """Return the gradient of one pair's readout."""
    weights = {n: w.clone().requires_grad_() for n, w in loss.weights.items()}
    with torch.enable_grad():
        value = READOUTS[readout](loss.predict(weights, pair)).sum()
    found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    return loss.shaped(loss.flat(dict(zip(weights, found, strict=True))))


def _times(weights: Weights, factor: float) -> Weights:
    return {name: value * factor for name, value in weights.items()}


def _change(
    loss: FunctionalLoss, pair: NoisedBatch, towards: Weights, readout: str, scale: float
) -> Tensor:
    """Return the derivative of a pair's readout at each position along a direction, ``[h, w]``."""

    def parts(weights: Weights) -> Tensor:
        return by_place(readout, loss.predict(weights, pair))[0]

    found: Tensor = loss.along(parts, towards)
    return scale * found.detach().float().cpu()
