"""The uncertainty of an answer: two error bars for each score, and the stability of its rank."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from dmin.attribution.coverage import bars_of, why_none
from dmin.attribution.features import ExampleBlock, FeatureSet
from dmin.attribution.inner_product import InnerProduct, scaled_rows
from dmin.attribution.method import Method
from dmin.attribution.ranking import Ranking

Array = np.ndarray
Change = Callable[[Tensor, slice], Tensor]  # rows [n, D, T, G, …] as some replicates have them
SURE = 1.96  # standard deviations: two scores that differ by more are distinguished, at 95 %
RESIDUES = 32  # parts of a sketch, each left out once
REDRAWS = 32  # of the draws of noise, an even number
BYTES = 8 << 20  # of rows in several replicates at once


class Deviations(NamedTuple):
    """Deviations ``[.., n]`` of n scores, with their degrees of freedom."""

    values: Array
    freedom: int


def with_confidence(
    ranking: Ranking,
    queries: FeatureSet,
    train: FeatureSet,
    method: Method,
    k: int,
    resamples: int = 400,
    seed: int = 0,
) -> Ranking:
    """Return the first k of a ranking, each with error bars and the stability of its rank.

    ``sketch_errors`` are the errors of compression, relative to full gradients at the same
    timesteps and noise. ``total_errors``, which need two independent draws, also include the noise:
    the error relative to the mean over many draws. Both are standard deviations: ±1.96 of them
    contain the true value 95 times in 100. They are shown only where that was measured to hold
    (`dmin.attribution.coverage`). ``stability`` is how often an example is among the first k of the
    candidates when all scores are perturbed by these errors. The order within one of the ``tiers``
    is not significant: no two of its examples differ by more than 1.96 standard deviations of their
    difference. All of this describes the randomness of measuring the score, not whether the score
    means influence.

    Args:
        ranking: with more than k examples per query, as others may belong among the first k.
        queries: of the ranking.
        train: the training examples.
        method: fitted.
        k: examples per query to return; all if the ranking has fewer.
        resamples: number of perturbations of the scores.
        seed: of the perturbations.

    Returns:
        The ranking with errors, ``stability`` and ``tiers``; or without them, and a note that says
        why.
    """
    k, first = min(k, ranking.scores.shape[1]), ranking.first(k)
    features = train.store.manifest.features
    bars = bars_of(method.name, features)
    if "total" in bars and independent_draws(train) < 2:
        bars -= {"total"}
    if not bars:
        why = why_none(method.name, features, sketched=bool(method.requires.readouts))
        return replace(first, notes={**first.notes, "error bars": why})
    shape = len(ranking.query_ids), k
    sketch, total, stability = np.zeros((3, *shape), dtype=np.float32)
    ahead = min(k + 1, ranking.scores.shape[1])  # who comes next may be of the last tier
    tiers = np.zeros((shape[0], ahead), dtype=np.int64)
    sign = 1 if ranking.order == "proponents" else -1
    generator = np.random.default_rng(seed)
    for query, rows in enumerate(ranking.train_rows):
        scores = ranking.scores[query].astype(np.float64)
        sources = [sketch_deviations(queries, train, method, query, rows)]
        found = widened(sources)
        sketch[query] = spread(found)[:k]
        if "total" in bars:
            sources += [noise_deviations(queries, train, method, query, rows, scores, seed)]
            found = widened(sources)
            total[query] = spread(found)[:k]
        drawn = scores + generator.normal(size=(resamples, len(found))) @ found
        # The k-th best of each: who scores as much is among the first k.
        least = np.sort(sign * drawn, axis=1)[:, -k]
        stability[query] = (sign * drawn >= least[:, None]).mean(0)[:k]
        tiers[query] = tiers_of(scores[:ahead], found[:, :ahead])
    return replace(
        first,
        sketch_errors=sketch if "sketch" in bars else None,
        total_errors=total if "total" in bars else None,
        stability=stability,
        tiers=tiers[:, :k],
        tier_goes_on=(tiers[:, k:] == tiers[:, k - 1 : k]).any(1),
    )


def sketch_deviations(
    queries: FeatureSet, train: FeatureSet, method: Method, query: int, rows: Array
) -> Deviations:
    """Return deviations ``F [32, n]`` of some scores, ``FᵀF`` the covariance of sketching errors.

    ``FᵀF = (B − 1)/B Σ_b (I_b − Ī)(I_b − Ī)ᵀ``, I_b the scores without the dimensions ≡ b
    (mod B = 32) of all sketches: a jackknife (Efron & Stein 1981). Each time the whole method
    is evaluated, so that powers, blends and normalisation are included, and errors of timesteps,
    which share one map, add up. Curvatures are not refitted, so error bars of methods
    with a curvature are far too large.

    Args:
        queries: one of which is the query.
        train: some rows of which were scored.
        method: fitted.
        query: row.
        rows: of training examples.
    """
    if train.store.manifest.features.get("sketch", {}).get("family") == "none":
        return Deviations(np.zeros((0, len(rows))), 1)
    dim = train.store.layout.dim
    count = min(RESIDUES, dim)
    kept = torch.arange(dim) % count != torch.arange(count)[:, None]
    masks = kept * (dim / kept.sum(1, keepdim=True)).sqrt()  # inner products keep their size

    def without(values: Tensor, part: slice) -> Tensor:
        chosen = masks[part]
        if values.dim() < 5:  # norms, of the gradient itself
            return values.expand(len(chosen), *values.shape)
        return values * chosen[:, None, None, None, None]

    whole = slice(0, count)
    asked = _changed(queries.block([query], method.requires), without, whole)
    product = method.transform_query(asked)
    if isinstance(product, InnerProduct):
        again = _products_without(product, train.block(rows, method.requires), masks)
    else:
        again = _scores_again(queries, train, method, query, rows, without, count)
    return Deviations((again - again.mean(0)) * np.sqrt((count - 1) / count), count - 1)


def _products_without(asked: InnerProduct, found: ExampleBlock, masks: Tensor) -> Array:
    """Return inner products of rows that lack residues in turn, float64 ``[B, n]``.

    Of the whole less that of the residue, so that no row is copied for each.

    Args:
        asked: the query as prepared by the method without each residue, B of them.
        found: the rows, whole.
        masks: what is left of a row, ``[B, k]``.
    """
    rows, count = scaled_rows(found, asked.scale, asked.readout), len(masks)
    missing = -rows.shape[-1] % count
    cut = torch.nn.functional.pad(rows, (0, missing)).unflatten(-1, (-1, count))
    own = torch.nn.functional.pad(asked.queries, (0, missing)).unflatten(-1, (-1, count))
    whole = torch.einsum("bdtm,ndtm->bndt", asked.queries.flatten(3), rows.flatten(3))
    own = own.diagonal(dim1=0, dim2=-1).contiguous()  # what each residue of the query lost
    lost = torch.stack([(own * row).sum((2, 3)) for row in cut]).movedim(-1, 0)
    left = (whole - lost).double()
    if asked.scale == "unit":
        energy = cut.square().sum((3, 4)).movedim(-1, 0).double()  # of each residue, [B, n, D, T]
        left /= (energy.sum(0) - energy).clamp(min=1e-24).sqrt()
    else:
        left *= masks.amax(1).double()[:, None, None, None]
    return left.sum((2, 3)).numpy()


def noise_deviations(
    queries: FeatureSet,
    train: FeatureSet,
    method: Method,
    query: int,
    rows: Array,
    scores: Array,
    seed: int = 0,
) -> Deviations:
    """Return deviations ``F [32, n]`` of some scores, ``FᵀF`` the covariance of errors of draws.

    ``FᵀF = D/(D − 1) · mean_r (I_r − I)(I_r − I)ᵀ``, I_r the scores when the D draws of
    each timestep are resampled with replacement, in the same way for all examples and the query.
    With two draws, one replaces the other, each equally often, which needs no D/(D − 1) (a
    half-sample: McCarthy 1969). Antithetic draws are resampled in pairs.

    Args:
        queries: as :func:`sketch_deviations`, like all that follow but two.
        train: the training side.
        method: fitted.
        query: row.
        rows: of training examples.
        scores: theirs, ``[n]``.
        seed: key of the redraws.
    """
    draws, steps = train.store.layout.row_shape[:2]
    count, generator = independent_draws(train), np.random.default_rng(seed)
    if count == 2:
        even = np.repeat([0, 1], REDRAWS // 2)[:, None].repeat(steps, 1)
        taken = np.repeat(generator.permuted(even, axis=0)[:, None], 2, axis=1)
    else:
        taken = generator.integers(count, size=(REDRAWS, count, steps))
    size = draws // count
    taken = (size * taken[:, :, None] + np.arange(size)[:, None]).reshape(REDRAWS, draws, steps)
    picks, times = torch.from_numpy(taken), torch.arange(steps)

    def redrawn(values: Tensor, part: slice) -> Tensor:
        return values[:, picks[part], times].movedim(1, 0)

    again = _scores_again(queries, train, method, query, rows, redrawn, REDRAWS)
    factor = 1 if count == 2 else np.sqrt(count / (count - 1))
    return Deviations((again - scores) * factor / np.sqrt(REDRAWS), steps * (count - 1))


def independent_draws(side: FeatureSet) -> int:
    """Return the draws of noise at each timestep; antithetic pairs count as one."""
    noise = side.store.manifest.features.get("noise", {})
    return side.store.layout.draws // (2 if noise.get("antithetic") else 1)


def spread(deviations: Array) -> Array:
    """Return the standard deviation of each score, ``[n]``, of deviations ``[…, n]``."""
    return np.sqrt(np.square(deviations).sum(0))


def widened(sources: Sequence[Deviations]) -> Array:
    """Join deviations of independent sources to one ``F [.., n]``, widened as they are estimates.

    By Student's t over 1.96, with ``(Σ v)² / Σ v²/ν`` degrees of freedom (Satterthwaite 1946), v
    the mean variance of each source and ν its own.
    """
    variances = np.array([np.square(each.values).sum(0).mean() for each in sources])
    own = np.array([max(1, each.freedom) for each in sources])
    freedom = variances.sum() ** 2 / max(float((variances**2 / own).sum()), 1e-300)
    factor = float(student.ppf(0.975, max(1, freedom))) / SURE
    return np.concatenate([each.values for each in sources]) * factor


def tiers_of(scores: Array, deviations: Array) -> Array:
    """Return the tier of each score, int64 ``[n]``: a new tier begins at a significant difference.

    Args:
        scores: best first, ``[n]``.
        deviations: F, ``[…, n]``; the covariance of their errors is ``FᵀF``.
    """
    between = deviations[:, :, None] - deviations[:, None]
    # Rounding is no difference: copies score alike to the last bits alone.
    apart = np.abs(scores[:, None] - scores) > SURE * spread(between) + 1e-6 * np.abs(scores).max()
    tiers, start = np.zeros(len(scores), dtype=np.int64), 0
    for place in range(1, len(scores)):
        begins = apart[place, start:place].any()
        start = place if begins else start
        tiers[place] = tiers[place - 1] + begins
    return tiers


def _scores_again(
    queries: FeatureSet,
    train: FeatureSet,
    method: Method,
    query: int,
    rows: Array,
    change: Change,
    count: int,
) -> Array:
    """Return the scores of ``count`` changed replicates, float64 ``[count, n]``."""
    asked, found = queries.block([query], method.requires), train.block(rows, method.requires)
    bytes_each = sum(values.nbytes for values in found.features.values())
    # Several at once are also scored against each other's rows, for nothing; few rows want it.
    size = max(1, min(count, BYTES // bytes_each))

    def scored() -> Iterator[Tensor]:
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            mine, theirs = (_changed(block, change, part) for block in (asked, found))
            scores = method.score(method.transform_query(mine), theirs)
            own = scores.unflatten(1, (-1, len(rows)))  # [replicate, replicate of the rows, n]
            yield own.diagonal().T.double()

    return torch.cat(list(scored())).numpy()


def _changed(block: ExampleBlock, change: Change, part: slice) -> ExampleBlock:
    """Return examples ``[n]`` in several replicates, one after the other."""

    def each(values: Tensor) -> Tensor:
        return change(values, part).flatten(0, 1)

    return replace(
        block,
        ids=list(block.ids) * (part.stop - part.start),
        features={name: each(values) for name, values in block.features.items()},
        norms={name: each(values) for name, values in block.norms.items()},
        checkpoints=[_changed(other, change, part) for other in block.checkpoints],
    )
