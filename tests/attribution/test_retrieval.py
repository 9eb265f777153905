"""Top-k against a full sort, methods against their formulas, stores that do not fit."""

import numpy as np
import pytest
import torch
from toy_ddpm import TINY_UNET

from dmin.attribution import (
    DMin,
    FeatureSet,
    GradCos,
    GradDot,
    PixelCosine,
    PixelL2,
    Popularity,
    Random,
    TopK,
    retrieve,
    score_matrix,
)
from dmin.collect import GradientCollector, predict_trainer
from dmin.data import Examples
from dmin.diffusion.noise import SharedNoise
from dmin.diffusion.timesteps import Stratified
from dmin.models.families.ddpm import DDPM
from dmin.runtime.errors import DminError
from dmin.sketches import BlockCyclic
from dmin.store import Store

METHODS = [
    DMin(),
    DMin([1, 2, 0.5]),
    DMin(renormalise=False),
    DMin(keep_norms=True),
    GradDot(),
    GradCos(),
    Popularity(),
    PixelL2(),
    PixelCosine(),
    Random(),
]


def collector(model):
    return GradientCollector(model, BlockCyclic(256), Stratified(3), SharedNoise(draws=2))


def collected(model, dataset, path):
    trainer = predict_trainer(accelerator="cpu", enable_progress_bar=False)
    return collector(model).collect(dataset, path, block_size=8, trainer=trainer)


@pytest.fixture(scope="module")
def sides(ddpm, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")
    queries = Examples(digits.examples[:3])
    train = Examples(digits.examples[3:] + digits.examples[:2])
    return (
        FeatureSet(collected(ddpm, queries, folder / "queries"), queries),
        FeatureSet(collected(ddpm, train, folder / "train"), train),
    )


def gradients(side):
    """Sketched gradients [n, T, D, k] in float64, straight from the store's arrays."""
    store = side.store
    rows = store.features("loss", 0, len(store)).astype(np.float64)[:, :, :, 0]
    return rows.transpose(0, 2, 1, 3), store.norms("loss")[..., 0].transpose(0, 2, 1)[..., None]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_hand(method, queries, train):
    """Each method's formula, one pair, timestep and draw at a time."""
    (q, qn), (x, xn) = gradients(queries), gradients(train)
    if isinstance(method, Popularity):
        everything = np.einsum("qtdk,ntdk->qn", unit(x), unit(x)) / 2
        return np.stack([everything.mean(0)] * len(q))
    if isinstance(method, DMin):
        weights = np.ones(3) if method.weights is None else method.weights.numpy()
        if method.scale != "none":
            q, x = (unit(q), unit(x)) if method.scale == "unit" else (q * qn, x * xn)
        each = np.einsum("qtdk,ntdk->qnt", q, x) / 2
        return (each * weights).sum(-1)
    if isinstance(method, GradDot):
        return (q * qn).sum((1, 2)) @ (x * xn).sum((1, 2)).T
    if isinstance(method, GradCos):
        return unit((q * qn).sum((1, 2))) @ unit((x * xn).sum((1, 2))).T
    pixels = [
        np.stack([s.image(i).numpy().ravel() for i in s.store.ids]).astype(np.float64)
        for s in (queries, train)
    ]
    if isinstance(method, PixelL2):
        return -((pixels[0][:, None] - pixels[1][None]) ** 2).sum(-1)
    return unit(pixels[0]) @ unit(pixels[1]).T


@pytest.mark.parametrize("method", METHODS[:-1], ids=lambda m: m.name)
def test_scores_follow_the_formula(sides, method):
    expected = by_hand(method, *sides)
    scale = np.abs(expected).max()
    assert np.abs(score_matrix(*sides, method) - expected).max() < 1e-5 * scale


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_scores_do_not_depend_on_the_blocks(sides, method, rows):
    whole = score_matrix(*sides, method)
    assert np.allclose(score_matrix(*sides, method, rows=rows), whole, rtol=1e-5, atol=1e-5)
    found = retrieve(*sides, method, k=6, rows=rows)
    order = np.argsort(-whole, axis=1, kind="stable")[:, :6]
    assert np.allclose(found.scores, np.take_along_axis(whole, order, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_contributions_add_up_to_the_scores(sides, method):
    found = retrieve(*sides, method, k=4)
    if found.contributions is None:
        assert method.name in ("grad_cos", "pixel_l2", "pixel_cosine", "random")
    else:
        assert np.allclose(found.contributions.sum(-1), found.scores, rtol=1e-4)


def test_an_exact_copy_comes_first_with_the_largest_score_there_is(sides):
    found = retrieve(*sides, k=3)
    for query in range(2):  # the third is not among the training examples
        assert found.train_ids[query][0] == found.query_ids[query]
        assert found.scores[query, 0] == pytest.approx(3, abs=1e-4)
    assert found.scores[2, 0] < 2.999


def test_random_is_uniform_and_the_same_for_a_pair_of_ids(sides):
    scores = score_matrix(*sides, Random(seed=1))
    assert scores.min() >= 0 and scores.max() < 1 and 0.3 < scores.mean() < 0.7
    assert (score_matrix(sides[0], sides[1], Random(seed=2)) != scores).all()


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("block", [1, 3, 64, 200])
def test_topk_equals_a_full_stable_sort_also_among_equals(levels, block):
    generator = torch.Generator().manual_seed(levels * block)
    scores = torch.randint(levels, (4, 200), generator=generator).float()
    best = TopK(4, 9)
    for start in range(0, 200, block):
        best.update(scores[:, start : start + block], start)
    expected = scores.argsort(dim=1, descending=True, stable=True)[:, :9]
    assert torch.equal(best.rows, expected)
    assert torch.equal(best.scores, scores.gather(1, expected))
    last = best.scores[:, -1:]
    assert torch.equal(best.tied, (scores == last).sum(1) - (best.scores == last).sum(1))


def test_stores_of_other_settings_are_refused_by_the_field(ddpm, digits, sides, tmp_path):
    other = DDPM.build(TINY_UNET, {"beta_schedule": "squaredcos_cap_v2"}).eval()
    stranger = collected(other, Examples(digits.examples[:3]), tmp_path / "other")
    with pytest.raises(DminError, match="weights"):
        retrieve(stranger, sides[1].store)


def test_an_incomplete_store_is_refused(ddpm, digits, sides, tmp_path):
    collected(ddpm, digits, tmp_path / "s")
    next((tmp_path / "s").glob("segment-*")).unlink()
    with pytest.raises(DminError, match=r"0 of (its )?26|of 26"):
        retrieve(sides[0], Store(tmp_path / "s"))


def test_bad_requests_are_refused(sides):
    with pytest.raises(DminError, match=r"k=0: choose 1 … 25"):
        retrieve(*sides, k=0)
    with pytest.raises(DminError, match=r"k=26"):
        retrieve(*sides, k=26)
    with pytest.raises(DminError, match="2 numbers for 3 timesteps"):
        retrieve(*sides, DMin([1, 2]))
    with pytest.raises(DminError, match=r"FeatureSet\(store, dataset\)"):
        retrieve(sides[0].store, sides[1].store, PixelL2())
    stale = FeatureSet(sides[1].store, Examples(sides[1].dataset.examples[1:]))
    with pytest.raises(DminError, match="the dataset has changed since it was collected"):
        retrieve(sides[0], stale, PixelL2())
